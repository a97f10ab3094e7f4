-- windows.lua: decides and charges a window.
--
-- A window is a string: a header, a stage for five entries of (time, cost), and a ring of them. The header is sum,
-- oldest, newest, when the key dies, cost of the newest, ahead, head, room in the ring, entries in the ring, entries
-- outside of it. It holds the newest entry; those before it gather on the stage, and move to the ring together. The
-- ring has its oldest at `head`, and room for at most half again as many as are live, and never for more than quota
-- or granules need. Times never decrease from entry to entry; one of units taken ahead lies up to `ahead` later than
-- they were taken. Header and stage as one string are called `raw`.
--
-- Needs   what `decide` knows of a limit (charges.lua); header and stage as they are stored, `read`; `shared`: the state of a
--         window that several charges share (sharing.lua); UPKEEP (window_upkeep.lua) where more is to do than to
--         write a header. A part of `decide`
-- Gives   `admitted`: how many of the charges all limits admit, once it has asked the next ones; it leaves `decide` with
--         nil where TIME lies outside a period. Its figures
-- Cost    two commands, and one more for every fifth entry

-- include window_load
if shared and not shared.raw then shared.raw, shared.read = raw, read end
if sum + (pays and admitted or 1) * cost > quota then
  admitted = pays and math.max(math.floor((quota - sum) / cost), 0) or 0
end

if j < n or more then
  admitted = decide(more, figures, op, first, n, number, charge_cost, charges, j + 1, next_at, alone, admitted)
  if not admitted then return nil end
end
if admitted > 0 and pays then
  -- include window_charge
elseif alone and raw ~= read then
  redis.pcall('SETRANGE', key, '0', raw) -- steps that can't be written down are taken again
end
local place = 3 * j
figures[place - 2], figures[place - 1], figures[place] = sum, later > 0 and oldest + length - now or 0, 0
if admitted < number then
  local ok, wait = pcall(part(UPKEEP).retry_after, key, quota, length, granule, raw, cost)
  figures[place] = ok and wait or length -- a damaged one is repaired as soon as something leaves it
end
