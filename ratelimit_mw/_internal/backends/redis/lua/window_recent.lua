-- window_recent.lua: takes a cost off an entry of a window that lies outside of its ring, as of a request that has just been
-- charged. That takes less than give_back of window_take.lua, which finds all others.
--
-- Needs   a window as it is stored, `raw`, and its granule; the `time` of a charge, and a `cost`
-- Gives   changed: what is to be written from its start on, up to the entry; nil where that is not found here

local changed
if #raw >= HEADER_SIZE then
  local sum, oldest, newest, _, spent, _, _, cap, ring, later = parse(HEADER, raw)
  if oldest <= newest and ring <= cap and sum >= spent and later > 0
    and #raw >= HEADER_SIZE + (later - 1) * ENTRY_SIZE
  then
    local index, stored, cost_at = later, newest, NEWEST_COST_AT
    while stored > time and index > 1 do
      local before, cost_before = parse(ENTRY, raw, HEADER_SIZE + 1 + (index - 2) * ENTRY_SIZE)
      if before < time then break end
      index, stored, spent = index - 1, before, cost_before
      cost_at = HEADER_SIZE + index * ENTRY_SIZE - 4
    end
    local is_found = stored == time
    if granule > 0 and stored > time and (index > 1 or ring == 0) then
      is_found = math.floor(stored / granule) == math.floor(time / granule)
    end
    local left = spent > cost and spent - cost or 0
    if is_found and (left > 0 or index + ring > 1) then
      changed = pack('<d', sum - spent + left) .. slice(raw, 9, cost_at) .. pack('<I4', left)
    end
  end
end
