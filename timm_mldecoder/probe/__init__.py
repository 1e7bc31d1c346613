"""The command `probe`: heads on a frozen backbone."""
