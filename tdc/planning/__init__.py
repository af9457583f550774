"""What to choose: contraction order, cost, budget, and the allocation of one budget over all sites."""
