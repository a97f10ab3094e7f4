-- renew.lua: lets slots and estimates that are still held last longer.
--
-- Needs   of MONEY records.lua, budgets.lua; of the others keep_alive (slot_sets.lua), drop_foreign (slot_repair.lua),
--         sentence (faults.lua), renew_meters (estimates.lua)
-- Gives   renew(op, first): the answer
-- Cost    three commands for a slot set, one for each slot, four for an estimate, as for one of units

local RENEWED = '\1'
local LOST = '\0'
local NOT_RENEWED = '\2'

local function renew_estimate(record, periods, lease)
  local estimate, settled, before = part(MONEY).get_record(record)
  if not estimate or settled >= 0 or before <= 0 then return end
  local at, has_lapsed = 0, false
  for _, p in ipairs(periods) do
    at, has_lapsed = max(at, part(MONEY).lapse_of(p, lease)), has_lapsed or before <= p.lapsed
  end
  if has_lapsed then at = -1 end -- in all of them, if in one
  part(MONEY).touch(record)
  call('SETRANGE', record, LAPSES_AT, pack('<d', at))
  for _, p in ipairs(periods) do part(MONEY).shift(p, estimate, before, at) end
end

local function renew(op, first)
  local _, slot_sets, position = parse('<I2I2', op, 2)
  local sets, answers, fault = {}, {}, ''
  for j = 1, slot_sets do
    local purged = redis.pcall('ZREMRANGEBYSCORE', KEYS[first + j], '-inf', now)
    sets[j] = {n = 0, lease = 0, added = {}, fault = false}
    if type(purged) == 'table' and not part(REPAIR).drop_foreign(KEYS[first + j]) then sets[j].fault = part(REPAIR).sentence(purged) end
  end
  while position <= #op do
    local id, lease, estimate_lease, number, n_periods, n_meters, index, record
    id, lease, estimate_lease, number, n_periods, n_meters, position = parse('<c16ddBBB', op, position)
    local answer, expires, periods, open = RENEWED, text(now + lease), {}, {}
    for _ = 1, number do
      index, position = parse('<I2', op, position)
      local set = sets[index + 1]
      if set.fault then
        answer, fault = answer == RENEWED and NOT_RENEWED or answer, set.fault
      elseif call('ZSCORE', KEYS[first + index + 1], id) then
        set.added[set.n + 1], set.added[set.n + 2], set.n = expires, id, set.n + 2
        set.lease = max(set.lease, lease)
      else
        answer = LOST
      end
    end
    if n_periods > 0 then record, position = parse('<I2', op, position) end
    for j = 1, n_periods do
      local ends
      index, ends, position = parse('<I2d', op, position)
      periods[j] = {KEYS[first + index + 1], ends}
    end
    for j = 1, n_meters do
      local at, estimate
      index, at, estimate, position = parse('<I2dd', op, position)
      open[j] = {KEYS[first + index + 1], at, estimate}
    end
    if record or n_meters > 0 then
      local ok, said = pcall(function()
        for j, period in ipairs(periods) do periods[j] = part(MONEY).load_period(unpack(period)) end
        if record then renew_estimate(KEYS[first + record + 1], periods, estimate_lease) end
        if n_meters > 0 then part(ESTIMATES).renew_meters(id, open, estimate_lease) end
      end)
      if not ok then answer, fault = answer == RENEWED and NOT_RENEWED or answer, part(REPAIR).sentence(said) end
    end
    answers[#answers + 1] = answer
  end
  for j, set in ipairs(sets) do
    if set.n > 0 then
      call('ZADD', KEYS[first + j], 'XX', unpack(set.added, 1, set.n))
      part(SHARING).keep_alive(KEYS[first + j], set.lease)
    end
  end
  return table.concat(answers) .. fault
end
