-- meters.lua: metered units: puts what was used in place of estimates, and ends them.
--
-- A record per charge says what it counts: the time of the charge, and 1 while its estimates may lapse; then for each
-- meter what counts at that time, what counts besides, and since when (-1: not settled yet).
--
-- Needs   member_of and on_set (estimates.lua), get_numbers (records.lua), note_damage (faults.lua), take_off
--         (finish.lua), decide (decide.lua). A part of `rare`
-- Gives   meter(op, first): the answer
--         renew_meters(id, record, sets, lease): lets the estimates of a lease last
-- Cost    four commands for a settle, and two or three for each window

local METER_HEAD = 4 -- of the operation, up to its first meter
local RECORD_HEAD = 16
local ENTRY_OF_METER = 24
local MANY_ENTRIES = 1002 -- more than a window has, where what was used is what was estimated at most

local function take_off_all(windows, first, at, cost)
  for j, w in ipairs(windows) do take_off(KEYS[first + j], w.quota, w.length, w.granule, at, cost) end
end

local function use(windows, first, cost)
  -- Charges windows with what was used, also beyond their limits: each by a charge of one limit. A window counts up to
  -- MOST_COST.
  for j, window in ipairs(windows) do
    local key, granule, units = KEYS[first + j], window.granule, cost
    local raw = redis.pcall('GETRANGE', key, '0', LAST_STAGED)
    if type(raw) == 'string' and #raw >= HEADER_SIZE then
      local sum, _, _, _, _, _, _, _, ring = parse(HEADER, raw)
      if ring > MANY_ENTRIES then granule = max(granule, math.floor(window.length / 1000)) end
      if sum >= 0 then units = math.min(cost, MOST_COST - sum) end
    end
    if units > 0 then
      local op = pack('<Bddd', WINDOW, MOST_COST, window.length, granule)
      decide(nil, {}, op, first + j - 1, 1, 1, units, true, 1, 1, true, 1)
    end
  end
end

local function settle_meter(id, at, open, windows, first, entry, amount, mode)
  -- What a settle of one meter has met. `entry` has what it counts, and is changed.
  local base, extra, extra_at = entry[1], entry[2], entry[3]
  if extra_at >= 0 then
    if base + extra == amount then return REPEATED end
    if mode ~= UNITS_REPLACE then return DIFFERENT end
    if extra > 0 then take_off_all(windows, first, extra_at, extra) end
  elseif open and base > 0 and on_set('ZREM', open, member_of(id, at, base)) == 0 then
    base = 0 -- it has lapsed, and was given back
  end
  if amount < base then
    take_off_all(windows, first, at, base - amount)
    base = amount
  elseif amount > base then
    use(windows, first, amount - base)
  end
  entry[1], entry[2], entry[3] = base, amount - base, now
  return SETTLED
end

local function end_meter(id, at, open, windows, first, entry, mode)
  -- Holds an estimate until it is settled, or ends it: it stays counted, or is given back.
  local base = entry[1]
  if entry[3] >= 0 or base == 0 then return end
  if open and on_set('ZREM', open, member_of(id, at, base)) == 0 then
    entry[1] = 0
  elseif mode == UNITS_GIVE_BACK then
    take_off_all(windows, first, at, base)
  end
end

local function read_record(record)
  local raw = get_numbers(record)
  if raw and (#raw < RECORD_HEAD or #raw % ENTRY_OF_METER ~= RECORD_HEAD) then
    note_damage(record)
    call('DEL', record)
    return nil
  end
  return raw
end

local function meter(op, first)
  local n_keys, mode, n = parse('<BBB', op, 2)
  local id = slice(op, -ID_SIZE)
  local record, position, key = KEYS[first + n_keys], METER_HEAD + 1, first
  local raw = read_record(record)
  if not raw or #raw ~= RECORD_HEAD + n * ENTRY_OF_METER then return UNKNOWN end
  local ends, longest, all_settled = mode >= UNITS_KEEP, 0, true
  if ends then call('DEL', record) else call('PEXPIRE', record, text(KEPT_FOR)) end -- works when memory is full
  local at, is_open = parse('<dd', raw)
  local parts, met = {slice(raw, 1, RECORD_HEAD)}, UNKNOWN
  for i = 1, n do
    local amount, n_windows, windows = nil, nil, {}
    amount, n_windows, position = parse('<dB', op, position)
    for j = 1, n_windows do
      local quota, length, granule
      quota, length, granule, position = parse('<ddd', op, position)
      windows[j], longest = {quota = quota, length = length, granule = granule}, max(longest, length)
    end
    local open = is_open == 1 and KEYS[key + 1]
    local entry = {parse('<ddd', raw, RECORD_HEAD + 1 + (i - 1) * ENTRY_OF_METER)}
    if mode > UNITS_REPLACE then
      end_meter(id, at, open, windows, key + 1, entry, mode)
    elseif amount >= 0 and amount <= MOST_COST then
      local said = settle_meter(id, at, open, windows, key + 1, entry, amount, mode)
      if met == UNKNOWN or said == DIFFERENT or met == REPEATED then met = said end
    end
    parts[i + 1], all_settled = pack('<ddd', entry[1], entry[2], entry[3]), all_settled and entry[3] >= 0
    key = key + 1 + n_windows
  end
  if ends then return SETTLED end
  if mode == UNITS_HOLD then parts[1], met = pack('<dd', at, 0), SETTLED end
  local life = math.floor(longest / 1000) + (all_settled and 0 or KEPT_FOR)
  call('SET', record, table.concat(parts), 'PX', text(life))
  return met
end

local function renew_meters(id, record, sets, lease)
  -- Lets the estimates of a lease last, but for those that have lapsed or are settled.
  local raw = read_record(record)
  if not raw then return end
  local at, is_open = parse('<dd', raw)
  if is_open ~= 1 then return end
  call('PEXPIRE', record, text(max(call('PTTL', record), KEPT_FOR)))
  for i, open in ipairs(sets) do
    local base, _, settled_at = parse('<ddd', raw, RECORD_HEAD + 1 + (i - 1) * ENTRY_OF_METER)
    if settled_at < 0 and base > 0 then
      local member = member_of(id, at, base)
      local lapses = on_set('ZSCORE', open, member)
      if lapses and tonumber(lapses) > now then call('ZADD', open, text(now + lease), member) end
    end
  end
end
