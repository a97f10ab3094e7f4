-- window_credit.lua: takes a cost off an entry of a window that lies outside of its ring, as of a request that has just
-- been charged: what give_back of window_upkeep.lua does, with less.
--
-- Needs   a window as it is stored, `raw`, with its key, quota, length and granule; the `time` of a charge, and a `cost`
-- Gives   changed: what is to be written; nil where the entry is none of these, where nothing is left of the first one,
--         or where the window has more to do

if #raw >= HEADER_SIZE then
  local sum, oldest, newest, dies, last, ahead, head, cap, ring, later = parse(HEADER, raw)
  local staged = (later - 1) * ENTRY_SIZE
  if newest <= now and oldest > now - length and oldest <= newest and ring <= cap and sum >= last and later > 0
    and #raw >= HEADER_SIZE + staged and time > now - length
  then
    local place, stored, spent = later, newest, last
    while stored > time and place > 1 do
      local before, cost_before = parse(ENTRY, raw, HEADER_SIZE + 1 + (place - 2) * ENTRY_SIZE)
      if before < time then break end
      place, stored, spent = place - 1, before, cost_before
    end
    local is_found = stored == time
    if granule > 0 and stored > time and (place > 1 or ring == 0) then
      is_found = math.floor(stored / granule) == math.floor(time / granule)
    end
    local left = math.max(spent - cost, 0)
    if is_found and (left > 0 or place + ring > 1) then
      local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + staged)
      if place == later then
        last = left
      else
        local at = (place - 1) * ENTRY_SIZE
        stage = slice(stage, 1, at) .. pack(ENTRY, stored, left) .. slice(stage, at + ENTRY_SIZE + 1)
      end
      changed = pack(WITH_STAGE, sum - spent + left, oldest, newest, dies, last, 0, head, cap, ring, later, stage)
    end
  end
end
