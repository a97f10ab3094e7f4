-- slots.lua: decides and charges a slot set.
--
-- A slot set is a sorted set: lease id by expiry. A slot is the id of its lease, so that freeing it twice removes
-- nothing more, and nobody else's slot.
--
-- Needs   as windows.lua; of other parts hold_slots and lengthen (slot_sets.lua), shorten (slot_repair.lua). A part of
--         `decide`
-- Gives   as windows.lua
-- Cost    three commands for a charge

local shared = not alone and part(SHARING).shared(key, letter, quota, length, granule)
local held, expired, count = shared and shared.n or 0, 0, nil
local looked = shared and shared.looked -- whether those that have expired are left out of the count
if charges then
  count = shared and shared.count or call('ZCARD', key)
  if count + number > quota and not looked then
    expired, looked = call('ZCOUNT', key, '-inf', now), true
    count = count - expired
    if count + number > quota then part(REPAIR).shorten(key, length) end
  end
else
  count = call('ZCOUNT', key, string.format('(%.0f', now), '+inf') + held / 2
end
if count + admitted > quota then admitted = math.max(quota - count, 0) end

if j < n or more then
  admitted = decide(more, figures, op, first, n, number, charge_cost, charges, j + 1, next_at, alone, admitted)
  if not admitted then return nil end
end
if charges and admitted < number and not looked then -- who is refused is told how many there are
  expired, looked = call('ZCOUNT', key, '-inf', now), true
  count = count - expired
end
if shared and charges then
  shared.looked, shared.count, shared.expired = looked, count, shared.expired + expired
end
if admitted > 0 and charges then
  local texts, from = figures.texts, #op - number * ID_SIZE + 1
  local expires = texts and texts[length] or more and more.lease == length and more.lapses
    or string.format('%.0f', now + length)
  if texts then texts[length] = expires end
  if admitted == 1 and not shared and expired == 0 then
    call('ZADD', key, expires, slice(op, from, from + ID_SIZE - 1))
  else
    local added = shared and shared.added or {}
    for i = held + 1, held + 2 * admitted, 2 do
      added[i], added[i + 1], from = expires, slice(op, from, from + ID_SIZE - 1), from + ID_SIZE
    end
    if shared then
      shared.n, shared.lease = held + 2 * admitted, math.max(shared.lease, length)
    else
      part(SHARING).hold_slots(key, added, 2 * admitted, expired)
    end
  end
  if not shared then
    local life = math.floor(length / 1000) + 1000
    if count == 0 then
      call('PEXPIRE', key, 2 * life)
    elseif call('PTTL', key) < life then
      part(SHARING).lengthen(key, life)
    end
  end
  count = count + admitted
  if shared then shared.count = count end
end
local place = 3 * j
figures[place - 2], figures[place - 1], figures[place] = count, 0, admitted < number and count + 1 > quota and 1 or 0
