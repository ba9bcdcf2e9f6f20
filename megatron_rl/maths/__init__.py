"""The formulas: pure functions and picklable losses on tensors. No process groups, no settings, no logging."""
