"""Pure decisions on recipes and measurements: the gate, the Pareto front, the choice, the next trial of a search."""
