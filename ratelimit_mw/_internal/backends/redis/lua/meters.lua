-- meters.lua: metered units: puts what was used in place of estimates, and ends them.
--
-- Most settles are for no more than the estimate: close.lua does them, and most ends. All others come here: for more,
-- once more, without an estimate, in place of another amount, of a lease that was detached, or late.
-- They make a record of the charge, which says what it counts: the time of the charge, and 1 while its estimates may lapse;
-- then for each meter what counts at that time, what counts besides, and since when (-1: not settled yet).
--
-- Most of a settle alone in a call would be making functions: so this one holds all that most settles need.
--
-- Needs   of ESTIMATES on_set (open_sets.lua), read_record and find_record (estimates.lua), take_off.lua; UPKEEP, REPAIR
--         (parts.lua)
-- Gives   meter(op, first): the answer
-- Cost    three commands for the first one of a lease, four for another, and two for each window

local function meter(op, first)
  local _, n_keys, mode, n, otherwise = byte(op, 1, METER_HEAD)
  local record, from, key_at = KEYS[first + n_keys], METER_HEAD + 1, first + 1
  local stored = redis.pcall('GET', record)
  if not stored then
    if otherwise ~= HAS_LAPSED or parse('<d', op, from + 8) == 0 then
      stored = part(ESTIMATES).find_record(op, first, record)
      if not stored then return UNKNOWN end
    end
  elseif #stored ~= UNITS_HEAD + n * UNITS_ENTRY then
    part(ESTIMATES).read_record(record) -- which mends what is damaged
    return UNKNOWN
  end
  local at, is_open, entries = 0, 1, nil
  if stored then at, is_open = parse('<dd', stored) else entries = '' end
  local met, longest, all_settled = UNKNOWN, 0, true
  local ends = mode >= UNITS_KEEP
  local is_dirty = ends -- whether there was a write, which the first has to be that works when memory is full
  if ends then call('DEL', record) end
  for i = 1, n do
    local amount, charged, base, extra_at, n_windows, position = parse('<ddddB', op, from)
    local entry_at, extra = UNITS_HEAD + (i - 1) * UNITS_ENTRY, 0
    if stored then
      base, extra, extra_at = parse('<ddd', stored, entry_at + 1)
    else
      at = charged
      if extra_at >= 0 then base, extra_at = extra_at, now end -- it was settled by close.lua
    end
    local settles, said, off, used = mode <= UNITS_REPLACE and amount >= 0 and amount <= MOST_COST, SETTLED, 0, 0
    local extra_off, extra_off_at, has_lapsed = 0, extra_at, false
    if settles and extra_at >= 0 then -- it was settled before
      if base + extra == amount then said = REPEATED elseif mode ~= UNITS_REPLACE then said = DIFFERENT end
      extra_off = extra
    elseif is_open == 1 and base > 0 and extra_at < 0 and (settles or mode > UNITS_REPLACE) then
      local open, member = KEYS[key_at], pack(MEMBER, slice(op, -ID_SIZE), at, base)
      local was_open = redis.pcall('ZREM', open, member)
      if type(was_open) == 'table' then was_open = part(ESTIMATES).on_set('ZREM', open, member) end
      if was_open == 1 then
        is_dirty = true
      else
        base, has_lapsed = 0, true -- and was given back
      end
    end
    local changes = settles and said == SETTLED
    if changes then
      if base > amount then off, base = base - amount, amount else used = amount - base end
      extra, extra_at = used, now
    elseif mode == UNITS_GIVE_BACK and extra_at < 0 then
      off = base
    end
    if not is_dirty and (changes or has_lapsed or mode == UNITS_HOLD) then
      call('PEXPIRE', record, KEPT_FOR)
      is_dirty = true
    end
    for index = key_at + 1, key_at + n_windows do
      local key, quota, length, granule, next_position = KEYS[index], parse('<ddd', op, position)
      if length > longest then longest = length end
      if changes and extra_off > 0 then
        part(ESTIMATES).take_off(key, quota, length, granule, extra_off_at, extra_off)
      end
      if off > 0 then
        local raw, time, cost = redis.pcall('GETRANGE', key, '0', LAST_STAGED), at, off
        if raw ~= '' and at + length > now then -- as in take_off.lua
          -- include window_credit
          if changed and not is_mended then call('SETRANGE', key, '0', changed) end
        end
      elseif used > 0 then -- also beyond the limit: a window counts up to MOST_COST
        local shared, more, cost, read = nil, nil, 1, redis.pcall('GETRANGE', key, '0', LAST_STAGED)
        quota = MOST_COST
        -- include window_load
        if ring > MANY_ENTRIES then granule = math.max(granule, math.floor(length / 1000)) end
        local admitted = math.min(used, MOST_COST - sum)
        if admitted > 0 then
          -- include window_charge
        end
      end
      position = next_position
    end
    if entries then
      entries = entries .. pack('<ddd', base, extra, extra_at)
    elseif not ends and (changes or has_lapsed) then
      call('SETRANGE', record, i == 1 and FIRST_ENTRY or entry_at, pack('<ddd', base, extra, extra_at))
    end
    if settles and (met == UNKNOWN or said == DIFFERENT or met == REPEATED) then met = said end
    all_settled, from, key_at = all_settled and extra_at >= 0, position, key_at + 1 + n_windows
  end
  if ends then return SETTLED end
  if mode == UNITS_HOLD then met = SETTLED end
  local life = math.floor(longest / 1000) + (all_settled and 0 or KEPT_FOR)
  if entries then
    if not is_dirty then call('PEXPIRE', record, life) end
    call('SET', record, pack('<dd', at, mode == UNITS_HOLD and 0 or 1) .. entries, 'PX', life)
    return met
  end
  if mode == UNITS_HOLD then call('SETRANGE', record, HOLDS_AT, pack('<d', 0)) end
  call('PEXPIRE', record, life)
  return met
end
