"""What a model computes and what that costs: cost, report, export."""
