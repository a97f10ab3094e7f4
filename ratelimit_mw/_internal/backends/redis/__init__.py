"""The backend on one Redis or Valkey server.

- `backend.py`: `RedisBackend`. It makes an operation of each charge, release, renewal and settle.
- `packing.py`, `own_costs.py`, `release_template.py`, `meter_packing.py`, `renewal_packing.py`: operations as
  bytes; `keys.py` and `letters.py` have the names in them.
- `operations.py`: what operations have in common; `composing.py` makes calls of them.
- `units.py`: chooses how metered units are settled and ended: by a smaller script or a command
  (`estimate_operation.py`), or by the main script.
- `loops.py`: a batcher for each event loop, and what ended loops leave. `lines.py`: the order of one
  lease's settles and its end.
- `batcher.py`: sends operations together. `backlog.py` has what waits: what is sent again (releases, settles)
  stays in it while the server is away. `replies.py` gives each operation its answer, and `error_log.py`
  logs errors.
- `link.py`, `deadlines.py`, `doubtful.py`, `calls.py`, `server_clock.py`, `time_limit.py`: the connection,
  time limits, lost answers.
- `script.py` loads the Lua scripts. `lua/batch.lua` says what the main one takes and answers;
  `lua/decide.lua` decides a charge, limit by limit (`lua/windows.lua`, `lua/slots.lua`, `lua/budgets.lua`).
  `lua/close.lua` is the smaller one.

Everything in one call of the script is atomic. A slot is an entry under its lease's random id: a charge
counts the set and adds its id in one step (`lua/slots.lua`), and a release removes that id alone, however
often it arrives (`lua/releases.lua`, or a plain `ZREM`).
"""
