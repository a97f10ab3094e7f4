-- window_charge.lua: charges a window, and writes it.
--
-- Needs   a window (window_load.lua); `cost`, and how many times that: `admitted`; `more` (charges.lua); `shared`: its state
--         where several charges share it (sharing.lua); UPKEEP and REPAIR (parts.lua). A part of windows.lua and of
--         meters.lua
-- Gives   raw, sum, oldest and later as they are then

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
