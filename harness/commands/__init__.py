"""What the commands of the command line do: those that take settings, and those that take the folder of a run."""
