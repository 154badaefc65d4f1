"""The command line `opd`."""
