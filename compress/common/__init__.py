"""What every other package may use: files, journals, costs, devices."""
