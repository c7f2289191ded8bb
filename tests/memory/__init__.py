"""Devices, headers and footprints."""
