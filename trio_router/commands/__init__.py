"""What `trio-router` does besides serving: each command a function of its options that returns an exit status."""
