"""Fitting a conversion to limits: what each layer may become, what that costs and loses, and the best choice of all."""
