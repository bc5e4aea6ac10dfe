"""The demo's embedded base model, data and external trainer, with the scripts that made them."""
