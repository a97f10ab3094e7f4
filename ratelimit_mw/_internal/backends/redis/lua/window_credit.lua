-- window_credit.lua: takes a cost off an entry of a window.
--
-- An entry outside of the window's ring, as of a request that has just been charged, is found here, with less than
-- give_back of window_upkeep.lua takes, which does all else.
--
-- Needs   a window as it is stored, `raw`, with its key, quota, length and granule; the `time` of a charge, and a `cost`;
--         give_back (window_upkeep.lua), repaired (window_repair.lua)
-- Gives   changed: what is to be written of it, nil for nothing; or what is written already, if it `is_mended`

local changed, is_mended
if #raw >= HEADER_SIZE then
  local sum, oldest, newest, dies, last, ahead, head, cap, ring, later = parse(HEADER, raw)
  local staged = (later - 1) * ENTRY_SIZE
  if newest <= now and oldest > now - length and oldest <= newest and ring <= cap and sum >= last and later > 0
    and #raw >= HEADER_SIZE + staged and time > now - length
  then
    local index, stored, spent = later, newest, last
    while stored > time and index > 1 do
      local before, cost_before = parse(ENTRY, raw, HEADER_SIZE + 1 + (index - 2) * ENTRY_SIZE)
      if before < time then break end
      index, stored, spent = index - 1, before, cost_before
    end
    local is_found = stored == time
    if granule > 0 and stored > time and (index > 1 or ring == 0) then
      is_found = math.floor(stored / granule) == math.floor(time / granule)
    end
    local left = spent > cost and spent - cost or 0
    if is_found and (left > 0 or index + ring > 1) then
      local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + staged)
      if index == later then
        last = left
      else
        local at = (index - 1) * ENTRY_SIZE
        stage = slice(stage, 1, at) .. pack(ENTRY, stored, left) .. slice(stage, at + ENTRY_SIZE + 1)
      end
      changed = pack(WITH_STAGE, sum - spent + left, oldest, newest, dies, last, 0, head, cap, ring, later, stage)
    end
  end
end
if not changed then
  local ok
  ok, changed = pcall(part(UPKEEP).give_back, key, quota, length, granule, raw, time, cost)
  if not ok then
    changed, is_mended = part(REPAIR).repaired(changed, key, quota, length, granule, raw), true
  end
end
