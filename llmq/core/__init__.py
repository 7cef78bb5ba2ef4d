"""What every room may lean on: errors, the rounding grid, the value in the middle, settings, time, memory, devices."""
