"""Model, processor, quantisation and adapter: the groups model, quant and adapter."""
