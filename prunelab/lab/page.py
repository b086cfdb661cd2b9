"""What a page of widgets needs beside them: names for screen readers, and a word when the kernel has gone."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

try:
    import ipywidgets as widgets
except ImportError:
    raise ImportError("widgets need ipywidgets: install it with pip install 'prunelab[lab]'") from None

# ipywidgets gives the handle of a slider no name, reads the number of a position in place of its words, and lets one
# type into a readout that listens to nobody; the header of a fold cannot be reached by the keyboard.
NAMES = """
const root = element.closest('.prunelab-page') || document.body;
const name = () => {
  for (const handle of root.querySelectorAll('[role=slider]')) {
    const row = handle.closest('.widget-slider');
    const label = row.querySelector('.widget-label'), readout = row.querySelector('.widget-readout');
    if (label && handle.getAttribute('aria-label') !== label.textContent)
      handle.setAttribute('aria-label', label.textContent);
    const typed = row.parentElement.querySelector('input[type=number]');
    const words = readout && readout.textContent ? readout.textContent : typed ? typed.value + ' %' : '';
    if (words && handle.getAttribute('aria-valuetext') !== words) handle.setAttribute('aria-valuetext', words);
    if (readout && row.classList.contains('prunelab-picked') && readout.contentEditable !== 'false')
      readout.contentEditable = 'false';
  }
  for (const header of root.querySelectorAll('.jupyter-widget-Collapse-header:not([tabindex])')) {
    header.tabIndex = 0;
    header.setAttribute('role', 'button');
    header.addEventListener('keydown', event => {
      if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); header.click(); }
    });
  }
};
new MutationObserver(name).observe(root, {subtree: true, childList: true, characterData: true, attributes: true,
  attributeFilter: ['aria-valuetext', 'contenteditable']});
name();
"""
# A widget whose kernel has gone gets this class from ipywidgets; no message of the kernel is needed for it.
GONE = """<style>.prunelab-gone {display: none}
.jupyter-widgets-disconnected .prunelab-gone, .jupyter-widgets-disconnected.prunelab-gone {display: block}
</style><p class="prunelab-gone" role="alert" style="border-left:4px solid #d55e00;padding:4px 10px;margin:4px 0">
The kernel of this page has gone: what is shown is old, and moves nothing. Run the cell again.</p>"""


def around(*parts: Any) -> list[Any]:
    """The parts of a widget, with what a page needs before and after them."""
    output = widgets.Output(layout={"height": "0", "margin": "0", "overflow": "hidden"})
    output.outputs = ({"output_type": "display_data", "data": {"application/javascript": NAMES}, "metadata": {}},)
    return [widgets.HTML(GONE), *parts, output]


class Page(widgets.VBox):
    """Widgets one below the other, which are a picture and a sentence where no kernel runs: in Markdown, on GitHub.

    Args:
        children: The widgets.
        still: Gives the picture as a PNG, and the sentence.
    """

    def __init__(self, children: list[Any], still: Callable[[], tuple[bytes, str]]) -> None:
        super().__init__(around(*children))
        self.add_class("prunelab-page")
        self._still = still

    def _repr_mimebundle_(self, **how: Any) -> dict[str, Any]:
        shown = super()._repr_mimebundle_(**how)
        found = shown[0] if isinstance(shown, tuple) else shown
        picture, words = self._still()
        return {**found, "image/png": picture, "text/plain": words, "text/markdown": html.escape(words, quote=False)}
