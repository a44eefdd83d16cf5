"""The `onestep` command."""
