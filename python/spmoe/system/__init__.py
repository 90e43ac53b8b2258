"""The machine: memory, devices, threads, files."""
