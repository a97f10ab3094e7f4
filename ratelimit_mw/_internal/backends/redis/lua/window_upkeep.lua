-- window_upkeep.lua: does with windows what a plain charge does not need.
--
-- All functions that `upkeep` gives take a window as `raw`, and raise DAMAGED where it can't be as it is stored.
--
-- Needs   window_entries.lua, step_over (window_take.lua)
-- Gives   refreshed(key, quota, length, granule, raw): the window without what has left it
--         written(key, quota, length, granule, raw): writes it after a charge, with room for the next one and a life
--         retry_after(key, quota, length, granule, raw, cost): microseconds until a cost fits

local GRANULES = 1002 -- entries that a window of shared ones can have, and one to spare
local MOST_ENTRIES = 2010 -- the same after its quota was raised past where sharing begins

local function life_of(length)
  return length + max(floor(length / 8), 1000000)
end

local function lengthen_life(w)
  w.dies = now + life_of(w.length)
  return text(floor(life_of(w.length) / 1000))
end

local function audit(w, dies)
  -- Compares the sum with the entries, and these with each other, each time that the end of a window's life,
  -- last `dies`, has come to the next multiple of three quarters of a length. Whether it has.
  local ends, period = now + life_of(w.length), 0.75 * w.length
  if dies == 0 or dies - dies % period == ends - ends % period then return false end
  local total, last = 0, w.oldest
  for time, cost in each(w, 0) do
    if not (time >= last and time <= w.newest) or total == 0 and time > last then error(DAMAGED, 0) end
    total, last = total + cost, time
  end
  if total ~= w.sum then error(DAMAGED, 0) end
  return true
end

local function rewrite(w, moved)
  -- Writes the window anew, with the ring in one piece and so many entries of the stage in it.
  local parts, first, ring, bound = {}, 0, w.ring + moved, w.granule > 0 and GRANULES or w.quota
  while first < w.ring do
    local raw, number = entries(w, first, w.ring)
    parts[#parts + 1], first = raw, first + number
  end
  parts[#parts + 1] = slice(w.stage, 1, moved * ENTRY_SIZE)
  if ring > bound then -- all of some was given back, or the quota was lowered, or raised
    local all = table.concat(parts)
    parts, ring = {}, 0
    for at = 1, #all, ENTRY_SIZE do
      if parse('<I4', all, at + 8) > 0 then
        ring = ring + 1
        parts[ring] = slice(all, at, at + ENTRY_SIZE - 1)
      end
    end
    if ring > bound then bound = MOST_ENTRIES end
  end
  local cap = ring > 0 and max(ring, min(max(floor(1.2 * ring), ring + STAGED), bound)) or 0
  parts[#parts + 1] = string.rep('\0', (cap - ring) * ENTRY_SIZE)
  w.stage, w.later = slice(w.stage, moved * ENTRY_SIZE + 1), w.later - moved
  w.head, w.cap, w.ring = 0, cap, ring
  local life = lengthen_life(w)
  local raw = raw_of(w)
  call('SET', w.key, raw .. string.rep('\0', RING - #raw) .. table.concat(parts), 'PX', life)
  return raw
end

local function written(key, quota, length, granule, raw)
  -- Writes a window after a charge: with a full stage moved to the ring, in a ring that fits, and with a life.
  local w = window(key, quota, length, granule, raw)
  local moved, room = w.later > STAGED + 1 and w.later - 2 or 0, 1.5 * (w.ring + w.later) + 2
  local lives = w.dies >= w.newest + w.length and w.dies <= w.newest + 2 * w.length
  local fits = w.ring + moved <= w.cap and w.cap <= room
  if not (lives and fits) then audit(w, w.dies) end
  if w.dies == 0 or not fits then return rewrite(w, moved) end
  if moved > 0 then
    write_ring(w, w.ring, slice(w.stage, 1, moved * ENTRY_SIZE))
    w.ring, w.later, w.stage = w.ring + moved, w.later - moved, slice(w.stage, moved * ENTRY_SIZE + 1)
  end
  local life = not lives and lengthen_life(w)
  raw = raw_of(w)
  call('SETRANGE', key, '0', raw)
  if life then call('PEXPIRE', key, life) end
  return raw
end

local function step_back(w)
  -- The server's clock went back: what was stored as later happened now at the latest, in one entry. What
  -- was taken ahead is used as much later as it could be when it was taken.
  local latest, total = now + w.ahead, 0
  local first = first_since(w, latest)
  for _, cost in each(w, first) do total = total + cost end
  w.ring = min(w.ring, first)
  w.stage, w.later = slice(w.stage, 1, (first - w.ring) * ENTRY_SIZE), first - w.ring + 1
  w.newest, w.cost = latest, total
  if first == 0 then w.oldest = latest end
  call('PEXPIRE', w.key, lengthen_life(w))
  call('SETRANGE', w.key, '0', raw_of(w))
end

local function refreshed(key, quota, length, granule, raw)
  -- The window without what has left it.
  local horizon = now - length
  local _, oldest, newest = parse(HEADER, raw)
  if newest <= horizon and oldest <= newest then return EMPTY end
  local w = window(key, quota, length, granule, raw)
  local dies = w.dies
  if w.newest <= now then w.ahead = 0 end
  if w.later > 0 and w.newest > now + w.ahead then step_back(w) end
  if w.oldest <= horizon then step_over(w, horizon) end
  if audit(w, dies) then call('PEXPIRE', key, lengthen_life(w)) end
  return raw_of(w)
end

local function retry_after(key, quota, length, granule, raw, cost)
  -- Microseconds until `cost` fits: when the oldest entries that make room for it have left. 0 where it does.
  local w = window(key, quota, length, granule, raw)
  local needed = w.sum + cost - w.quota
  if needed <= 0 then return 0 end
  for time, spent in each(w, 0) do
    needed = needed - spent
    if needed <= 0 then return max(time + w.length - now, 1) end
  end
  return w.length
end
