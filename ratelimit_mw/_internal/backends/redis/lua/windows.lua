-- windows.lua: decides and charges a window.
--
-- A window is a string: a header, a stage for five entries of (time, cost), and a ring of them. The header is sum,
-- oldest, newest, when the key dies, cost of the newest, ahead, head, room in the ring, entries in the ring, entries
-- outside of it. It holds the newest entry; those before it gather on the stage, and move to the ring together. The
-- ring has its oldest at `head`, and room for at most half again as many as are live, and never for more than quota
-- or granules need. Times never decrease from entry to entry; one of units taken ahead lies up to `ahead` later than
-- they were taken. Header and stage as one string are called `raw`.
--
-- Needs   what `decide` knows of a limit (charges.lua); UPKEEP (window_upkeep.lua) where more is to do than to write
--         a header; SHARING and REPAIR (parts.lua) where several charges share a window or one is damaged. A
--         part of `decide`
-- Gives   `admitted`: how many of the charges all limits admit, once it has asked the next ones; it leaves `decide` with
--         nil where TIME lies outside a period. Its figures
-- Cost    two commands, and one more for every fifth entry

local shared = not alone and part(SHARING).shared(key, letter, quota, length, granule)
local read = shared and shared.raw or redis.pcall('GETRANGE', key, '0', LAST_STAGED)
if #read < HEADER_SIZE then
  read = read == '' and EMPTY or part(REPAIR).repaired(DAMAGED, key, quota, length, granule, read)
end
local raw, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = read, parse(HEADER, read)
if newest <= now and oldest > now - length and oldest <= newest and ring <= cap and sum >= 0 then
  ahead = 0
elseif newest <= now - length and oldest <= newest then
  raw = EMPTY
  sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
else
  -- include window_start
  if not raw then
    local ok, fresh = pcall(part(UPKEEP).refreshed, key, quota, length, granule, read)
    raw = ok and fresh or part(REPAIR).repaired(fresh, key, quota, length, granule, read)
  end
  sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = parse(HEADER, raw)
end
if later == 0 then read = raw end -- who only looks writes nothing
if shared and not shared.raw then shared.raw, shared.read = raw, read end
if sum + admitted * cost > quota then admitted = math.max(math.floor((quota - sum) / cost), 0) end

if j < n or more then
  admitted = decide(more, figures, op, first, n, number, charge_cost, charges, j + 1, next_at, alone, admitted)
  if not admitted then return nil end
end
if admitted > 0 and pays then
  local in_advance, last, last_cost, format = more and more.ahead or 0, newest, newest_cost, WITH_STAGE
  local stamp = now + in_advance
  local stage = slice(raw, HEADER_SIZE + 1, HEADER_SIZE + (later - 1) * ENTRY_SIZE)
  if later > 0 and newest > stamp then stamp = newest end -- of what another has taken ahead
  newest, newest_cost = stamp, admitted * cost
  sum = sum + newest_cost
  if in_advance > ahead then ahead = in_advance end
  if later == 0 then
    oldest, later = stamp, 1
  elseif last == stamp or granule > 0 and last >= stamp - stamp % granule then
    newest_cost = newest_cost + last_cost
    if ring + later == 1 then oldest = stamp end
  else
    format, later = WITH_ENTRY, later + 1
  end
  local is_due, life = later > STAGED + 1 or cap > 1.5 * (ring + later) + 2, nil -- for upkeep; lengthened without
  if not (shared or is_due or dies >= newest + length and dies <= newest + 2 * length) then
    -- include window_life
    if is_audited then dies, life = ends, ends - now else is_due = true end
  end
  raw = pack(format, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later, stage, last, last_cost)
  if shared then
    shared.raw = raw
  elseif is_due then
    local ok, written = pcall(part(UPKEEP).written, key, quota, length, granule, raw)
    raw = ok and written or part(REPAIR).repaired(written, key, quota, length, granule, raw)
  else
    call('SETRANGE', key, '0', raw)
    if life then call('PEXPIRE', key, math.floor(life / 1000)) end
  end
elseif alone and raw ~= read then
  redis.pcall('SETRANGE', key, '0', raw) -- steps that can't be written down are taken again
end
local place = 3 * j
figures[place - 2], figures[place - 1], figures[place] = sum, later > 0 and oldest + length - now or 0, 0
if admitted < number then
  local ok, wait = pcall(part(UPKEEP).retry_after, key, quota, length, granule, raw, cost)
  figures[place] = ok and wait or length -- a damaged one is repaired as soon as something leaves it
end
