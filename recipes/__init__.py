"""The recipes that ship with `compress`, one YAML file each."""
