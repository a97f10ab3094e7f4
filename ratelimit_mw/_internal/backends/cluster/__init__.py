"""The backend on a cluster: a step for each partition, a batcher for each node."""
