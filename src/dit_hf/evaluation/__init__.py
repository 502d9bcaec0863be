"""Metrics of generated images: features → statistics → metric; one file a metric, one table of metrics."""
