"""The backend on a cluster: a step for each partition, a batcher for each node.

- `backend.py`: charges of several partitions, step by step; `steps.py` puts the answers together.
- `router.py`: takes each operation to the node that serves its keys, and after keys that have moved.
- `grouping.py`: which operations share a call of the script.
- `nodes.py`: the map of hash slots. `probes.py`: whether a lost node is back. `first.py`: the first of many
  answers.
"""
