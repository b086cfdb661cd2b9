"""Notebooks without a browser: the runner in front of papermill, forms, ``reproduce``, and the lists of the README."""
