"""What a model needs (`gguf`, `footprint`) and what the devices have (`devices`)."""
