-- window_repair.lua: makes a damaged window anew.
--
-- Needs   note_damage (faults.lua).
-- Gives   repaired(fault, key, quota, length, granule, raw): the header of the new window, or the error again if it tells
--         of no damage

local MOST_BYTES = 50000 -- more than any window has

local function repaired(fault, key, quota, length, granule, raw)
  -- Makes a window anew of those of its entries, wherever they are stored, that can be true. What the sum has
  -- beyond them leaves a length after the last audit: the damage is younger. Where nothing is known, the
  -- window is full. Gives its header.
  if type(raw) == 'table' then -- a command that failed
    if not raw.err:find('^WRONGTYPE') then error(raw, 0) end
    raw = ''
  end
  if fault ~= DAMAGED and #raw >= HEADER_SIZE then error(fault, 0) end
  local found = redis.pcall('GETRANGE', key, '0', text(MOST_BYTES - 1))
  local sum, newest, dies, cost, ahead, _ = -1, 0, 0, 0, 0, nil
  if #raw >= HEADER_SIZE then sum, _, newest, dies, cost, ahead = parse(HEADER, raw) end
  if ahead > length / 8 then ahead = 0 end
  local life = length + max(math.floor(length / 8), 1000000)
  local horizon, latest, total, costs, times = now - length, now + ahead, 0, {}, {}

  local function add(time, cost)
    if time > horizon and time <= latest and time % 1 == 0 and cost > 0 then
      if not costs[time] then times[#times + 1] = time end
      total = total - (costs[time] or 0)
      costs[time] = max(costs[time] or 0, math.min(cost, quota))
      total = total + costs[time]
    end
  end

  for _, stored in ipairs({raw, type(found) == 'string' and found or ''}) do
    for at = HEADER_SIZE + 1, #stored - ENTRY_SIZE + 1, ENTRY_SIZE do add(parse(ENTRY, stored, at)) end
  end
  add(newest, cost)
  local lost, since = 0, now
  if sum >= 0 and sum <= MOST_MONEY and sum % 1 == 0 then
    lost = math.min(sum, quota) - total
    if dies > now and dies <= now + life then since = dies - dies % (0.75 * length) - life end
  elseif total == 0 then
    lost = quota
  end
  if lost > 0 then add(since, lost + (costs[since] or 0)) end
  table.sort(times)

  local ring = {}
  for i = 1, #times - 1 do ring[i] = pack(ENTRY, times[i], costs[times[i]]) end
  local header, last = EMPTY, times[#times]
  if last then
    header = pack(HEADER, total, times[1], last, now + life, costs[last], max(last - now, 0), 0, #ring, #ring, 1)
  end
  call('SET', key, header .. string.rep('\0', STAGED * ENTRY_SIZE) .. table.concat(ring), 'PX',
    text(math.floor(life / 1000)))
  note_damage(key)
  return header
end
