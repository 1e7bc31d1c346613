"""A run that cannot go on, through no mistake in its options."""


class RunFailed(RuntimeError):
    """Told in one line that names the cause and the remedy; the process ends with exit code 1."""
