-- meters.lua: metered units: puts what was used in place of estimates, and ends them.
--
-- A record per charge says what it counts: the time of the charge, and 1 while its estimates may lapse; then for each
-- meter what counts at that time, what counts besides, and since when (-1: not settled yet).
--
-- Needs   get_numbers (numbers.lua), on_set (open_sets.lua), take_off.lua, note_damage (faults.lua), windows.lua
-- Gives   meter(op, first): the answer; read_record(record): a record as it is stored, nil where there is none
-- Cost    three commands for a settle, and two or three for each window

local METER_HEAD = 4 -- of the operation, up to its first meter
local MANY_ENTRIES = 1002 -- more than a window has, where what was used is what was estimated at most

local function read_record(record)
  local raw = get_numbers(record)
  if raw and (#raw < UNITS_HEAD or #raw % UNITS_ENTRY ~= UNITS_HEAD) then
    part(REPAIR).note_damage(record)
    call('DEL', record)
    return nil
  end
  return raw
end

local function use(key, quota, length, granule, cost)
  -- Charges a window with what was used, also beyond its limit: it counts up to MOST_COST.
  local raw = redis.pcall('GETRANGE', key, '0', LAST_STAGED)
  if type(raw) == 'string' and #raw >= HEADER_SIZE then
    local sum, _, _, _, _, _, _, _, ring = parse(HEADER, raw)
    if ring > MANY_ENTRIES then granule = max(granule, floor(length / 1000)) end
    if sum >= 0 then cost = min(cost, MOST_COST - sum) end
  end
  if cost <= 0 then return end
  quota = MOST_COST
  local more, figures, op, first, charge_cost, charges, next_at -- of a charge of this window alone
  local alone, letter, j, n, number, admitted, pays = true, WINDOW, 1, 1, 1, 1, true
  figures = {}
  -- include windows
end

local function meter(op, first)
  local _, n_keys, mode, n = byte(op, 1, METER_HEAD)
  local id, record, from, key = slice(op, -ID_SIZE), KEYS[first + n_keys], METER_HEAD + 1, first
  local raw = read_record(record)
  if not raw or #raw ~= UNITS_HEAD + n * UNITS_ENTRY then return UNKNOWN end
  local at, is_open = parse('<dd', raw)
  local ends, met, longest, all_settled = mode >= UNITS_KEEP, UNKNOWN, 0, true
  local entries = pack('<dd', at, mode == UNITS_HOLD and 0 or is_open)
  local is_dirty = ends -- whether there was a write, which the first has to be that works when memory is full
  if ends then call('DEL', record) end
  for i = 1, n do
    local amount, n_windows, position = parse('<dB', op, from)
    local base, extra, extra_at = parse('<ddd', raw, UNITS_HEAD + 1 + (i - 1) * UNITS_ENTRY)
    local settles, off, used = mode <= UNITS_REPLACE and amount >= 0 and amount <= MOST_COST, 0, 0
    local extra_off, extra_off_at = 0, extra_at
    local said = SETTLED
    if settles and extra_at >= 0 then -- it was settled before
      if base + extra == amount then said = REPEATED elseif mode ~= UNITS_REPLACE then said = DIFFERENT end
      extra_off = extra
    elseif is_open == 1 and base > 0 and extra_at < 0 and (settles or mode > UNITS_REPLACE) then
      if on_set('ZREM', KEYS[key + 1], pack(MEMBER, id, at, base)) == 1 then
        is_dirty = true
      else
        base = 0 -- it has lapsed, and was given back
      end
    end
    if not is_dirty then
      call('PEXPIRE', record, KEPT_FOR)
      is_dirty = true
    end
    local changes = settles and said == SETTLED
    if changes then
      off, used = max(base - amount, 0), max(amount - base, 0)
      base, extra, extra_at = base - off, used, now
    elseif mode == UNITS_GIVE_BACK and extra_at < 0 then
      off = base
    end
    for j = 1, n_windows do
      local quota, length, granule, behind = parse('<ddd', op, position)
      local window = KEYS[key + 1 + j]
      if changes and extra_off > 0 then take_off(window, quota, length, granule, extra_off_at, extra_off) end
      if off > 0 then take_off(window, quota, length, granule, at, off) end
      if used > 0 then use(window, quota, length, granule, used) end
      longest, position = max(longest, length), behind
    end
    if settles and (met == UNKNOWN or said == DIFFERENT or met == REPEATED) then met = said end
    entries, all_settled = entries .. pack('<ddd', base, extra, extra_at), all_settled and extra_at >= 0
    from, key = position, key + 1 + n_windows
  end
  if ends then return SETTLED end
  call('SET', record, entries, 'PX', floor(longest / 1000) + (all_settled and 0 or KEPT_FOR))
  return mode == UNITS_HOLD and SETTLED or met
end
