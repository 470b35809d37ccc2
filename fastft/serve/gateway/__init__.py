"""The gateway between clients and workers: one address for all models, failover, and the record of every turn."""
