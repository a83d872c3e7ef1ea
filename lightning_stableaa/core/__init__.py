"""Pure numerics of the method; nothing here knows optimizers, modules or ranks."""
