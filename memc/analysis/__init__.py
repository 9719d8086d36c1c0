"""What passes ask of a model before they choose: which layers and heads matter."""
