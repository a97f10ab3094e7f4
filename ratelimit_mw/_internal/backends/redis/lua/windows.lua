-- windows.lua: decides and charges windows.
--
-- A window is a string: a header, a stage for five entries of (time, cost), and a ring of them. The header is sum,
-- oldest, newest, when the key dies, cost of the newest, ahead, head, room in the ring, entries in the ring, entries
-- outside of it. It holds the newest entry; those before it gather on the stage, and move to the ring together. The
-- ring has its oldest at `head`, and room for at most half again as many as are live, and never for more than quota
-- or granules need. Times never decrease from entry to entry; one of units taken ahead lies up to `ahead` later than
-- they were taken. Header and stage as one string are called `raw`.
--
-- Needs   `decide`, which decides the next limit; `upkeep` (window_upkeep.lua) where more is to do than to write a
--         header; `rare` (sharing.lua, window_repair.lua) where several charges share a window or one is damaged
-- Gives   decide_window(plan, limit, key, j, alone, admitted): how many of the charges all limits admit, nil where TIME
--         lies outside a period; the figures are in `reply`
-- Cost    two commands, and one more for every fifth entry

local function without_few(key, length, raw)
  -- A window without what has left it, where those are a few of its ring; nil where there is more to do, as when
  -- the end of its life has come to the next multiple of three quarters of a length: then it is audited.
  local sum, _, newest, dies, newest_cost, _, head, cap, ring, later = unpack(HEADER, raw)
  local ends, period = now + length + (length < 8000000 and 1000000 or length / 8), 0.75 * length
  if not (newest <= now and ring > 0 and ring <= cap and head < cap) or dies - dies % period ~= ends - ends % period
  then
    return nil
  end
  local from = RING + head * ENTRY_SIZE
  local piece = call('GETRANGE', key, text(from), text(from + math.min(ring, cap - head, 4) * ENTRY_SIZE - 1))
  for at = 1, #piece - ENTRY_SIZE + 1, ENTRY_SIZE do
    local time, cost = unpack(ENTRY, piece, at)
    if time > now - length and cost > 0 then
      if time > newest or not (sum >= cost) then return nil end -- damaged
      local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
      return pack(WITH_STAGE, sum, time, newest, dies, newest_cost, 0, head, cap, ring, later, stage)
    end
    sum, head, ring = sum - cost, head + 1, ring - 1
  end
end

local function decide_window(plan, limit, key, j, alone, admitted)
  local shared = not alone and rare().shared(key, limit)
  local read = shared and shared.raw or redis.pcall('GETRANGE', key, '0', LAST_STAGED)
  if #read < HEADER_SIZE then
    read = read == '' and string.rep('\0', HEADER_SIZE) or rare().repaired(DAMAGED, key, limit, read)
  end
  local raw, length, cost, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later =
    read, limit.length, limit.cost, unpack(HEADER, read)
  if newest <= now and oldest > now - length and oldest <= newest and ring <= cap and sum >= 0 then
    ahead = 0
  else
    raw = without_few(key, length, read)
    if not raw then
      local ok, fresh = pcall(upkeep().refreshed, key, limit, read)
      raw = ok and fresh or rare().repaired(fresh, key, limit, read)
    end
    sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = unpack(HEADER, raw)
  end
  if later == 0 then read = raw end -- who only looks writes nothing
  if shared and not shared.raw then shared.raw, shared.read = raw, read end
  if sum + admitted * cost > limit.quota then admitted = math.max(math.floor((limit.quota - sum) / cost), 0) end

  admitted = decide(plan, j + 1, alone, admitted)
  if not admitted then return nil end
  if admitted > 0 and limit.charges then
    local stamp, last, last_cost, granule, format = now + plan.ahead, newest, newest_cost, limit.granule, WITH_STAGE
    local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
    if later > 0 and newest > stamp then stamp = newest end -- of what another has taken ahead
    newest, newest_cost = stamp, admitted * cost
    sum = sum + newest_cost
    if plan.ahead > ahead then ahead = plan.ahead end
    if later == 0 then
      oldest, later = stamp, 1
    elseif last == stamp or granule > 0 and last >= stamp - stamp % granule then
      newest_cost = newest_cost + last_cost
      if ring + later == 1 then oldest = stamp end
    else
      format, later = WITH_ENTRY, later + 1
    end
    raw = pack(format, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later, stage, last, last_cost)
    if shared then
      shared.raw = raw
    elseif not (dies >= newest + length) or dies > newest + 2 * length or later > STAGED + 1
      or cap > 1.5 * (ring + later) + 2
    then
      local ok, written = pcall(upkeep().written, key, limit, raw)
      raw = ok and written or rare().repaired(written, key, limit, raw)
    else
      call('SETRANGE', key, '0', raw)
    end
  elseif alone and raw ~= read then
    redis.pcall('SETRANGE', key, '0', raw) -- steps that can't be written down are taken again
  end
  local at = 3 * j
  reply[at - 2], reply[at - 1] = sum, later > 0 and oldest + length - now or 0
  reply[at] = 0
  if admitted < plan.number then
    local ok, wait = pcall(upkeep().retry_after, key, limit, raw, cost)
    reply[at] = ok and wait or length -- a damaged one is repaired as soon as something leaves it
  end
  return admitted
end
