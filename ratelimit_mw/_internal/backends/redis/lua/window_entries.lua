-- window_entries.lua: reads and writes entries of a window, wherever they are stored.
--
-- Needs   nothing but what batch.lua defines.
-- Gives   window(key, quota, length, granule, raw): the unpacked window `w`, or the error DAMAGED; raw_of(w): packs it again
--         entries(w, first, number), each(w, first): entries from an index on, as bytes, or one after the other
--         first_since(w, time): the index of the first entry at a time or later
--         write_ring(w, first, raw): writes entries to the ring
-- Cost    one command for each piece that is read; two to write where the ring is turned

local CHUNK = 32 -- entries that `each` reads at once
local MOST_OUTSIDE = 99 -- more than a batch puts outside of the ring

local function window(key, quota, length, granule, raw)
  local w = { -- every field at once, as a table that grows costs more
    key = key, quota = quota, length = length, granule = granule, stage = '',
    sum = 0, oldest = 0, newest = 0, dies = 0, cost = 0, ahead = 0, head = 0, cap = 0, ring = 0, later = 0,
  }
  w.sum, w.oldest, w.newest, w.dies, w.cost, w.ahead, w.head, w.cap, w.ring, w.later = parse(HEADER, raw)
  w.stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (w.later - 1) * ENTRY_SIZE)
  local is_empty = w.later == 0 and w.ring == 0 and w.sum == 0
  local is_whole = w.later > 0 and w.later <= MOST_OUTSIDE and #w.stage == (w.later - 1) * ENTRY_SIZE
  if not (is_empty or is_whole and w.sum >= w.cost and w.oldest <= w.newest)
    or w.ring > w.cap or w.head >= max(w.cap, 1) or w.ahead > w.length / 8
  then
    error(DAMAGED, 0)
  end
  return w
end

local function raw_of(w)
  local header = pack(HEADER, w.sum, w.oldest, w.newest, w.dies, w.cost, w.ahead, w.head, w.cap, w.ring, w.later)
  return header .. w.stage
end

local function entries(w, first, number)
  -- Reads up to `number` entries from the `first` on, or all of those outside the ring.
  if first >= w.ring then
    first = first - w.ring
    return slice(w.stage .. pack(ENTRY, w.newest, w.cost), first * ENTRY_SIZE + 1), w.later - first
  end
  local at = (w.head + first) % w.cap
  number = min(number, w.ring - first, w.cap - at)
  local from = RING + at * ENTRY_SIZE
  local raw = call('GETRANGE', w.key, text(from), text(from + number * ENTRY_SIZE - 1))
  if #raw < number * ENTRY_SIZE then error(DAMAGED, 0) end
  return raw, number
end

local function each(w, first)
  -- Walks the entries from the `first` on: time and cost.
  local raw, number, i = nil, 0, 0
  return function()
    if i == number then
      first, i = first + number, 0
      if first == w.ring + w.later then return nil end
      raw, number = entries(w, first, CHUNK)
    end
    i = i + 1
    return parse(ENTRY, raw, i * ENTRY_SIZE - 11)
  end
end

local function first_since(w, time)
  -- The index of the first entry at `time` or later; the count where there is none.
  local low, high = 0, w.ring + w.later
  if w.later > 0 and w.ring > 0 then -- nothing has to be read of what lies outside the ring
    if parse(ENTRY, (entries(w, w.ring, 1))) < time then low = w.ring + 1 else high = w.ring end
  end
  while low < high do
    local middle = floor((low + high) / 2)
    if parse(ENTRY, (entries(w, middle, 1))) < time then low = middle + 1 else high = middle end
  end
  return low
end

local function write_ring(w, first, raw)
  local at = (w.head + first) % w.cap
  local size = (w.cap - at) * ENTRY_SIZE
  call('SETRANGE', w.key, text(RING + at * ENTRY_SIZE), slice(raw, 1, size))
  if #raw > size then call('SETRANGE', w.key, text(RING), slice(raw, size + 1)) end
end
