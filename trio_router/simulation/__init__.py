"""A day of traffic in seconds: the registry, its schedulers and its policy in virtual time, with modelled backends."""
