"""The command `validate`: metrics, class reports, thresholds, report pages."""
