-- window_take.lua: takes a cost off an entry of a window, wherever that is stored.
--
-- No time is needed for it: of a charge that has left the window since, the entry is gone, or will go with what is left
-- of it.
--
-- Needs   window_entries.lua
-- Gives   step_over(w, horizon): removes from a window's start what happened at `horizon` or before, and what costs nothing
--         give_back(key, quota, length, granule, raw, time, cost): takes `cost` off the entry that the charge at `time` went
--         into: the header and stage to write; nil where there is no such entry. Raises DAMAGED

local function step_over(w, horizon)
  local gone = 0
  for time, cost in each(w, 0) do
    if time > horizon and cost > 0 then
      w.oldest = time
      break
    end
    w.sum, gone = w.sum - cost, gone + 1
  end
  local of_ring = min(gone, w.ring)
  w.head, w.ring = (w.head + of_ring) % max(w.cap, 1), w.ring - of_ring
  w.later, w.stage = w.later - gone + of_ring, slice(w.stage, (gone - of_ring) * ENTRY_SIZE + 1)
  if not (w.sum >= 0) or w.later == 0 and w.sum > 0 then error(DAMAGED, 0) end
end

local function give_back(key, quota, length, granule, raw, time, cost)
  local w = window(key, quota, length, granule, raw)
  local i, last = first_since(w, time), w.ring + w.later - 1
  if i > last then return nil end
  local stored, spent = parse(ENTRY, (entries(w, i, 1)))
  if stored ~= time and (granule == 0 or floor(stored / granule) ~= floor(time / granule)) then return nil end
  cost = min(cost, spent)
  w.sum = w.sum - cost
  local changed, at = pack(ENTRY, stored, spent - cost), (i - w.ring) * ENTRY_SIZE
  if i == last then
    w.cost = spent - cost
  elseif i < w.ring then
    write_ring(w, i, changed)
  else
    w.stage = slice(w.stage, 1, at) .. changed .. slice(w.stage, at + ENTRY_SIZE + 1)
  end
  if i == 0 then step_over(w, 0) end
  return raw_of(w)
end
