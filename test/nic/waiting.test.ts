import { afterAll, describe, expect, it } from 'vitest';
import { SaState } from '../../src/ipsec/sa-state.ts';
import { burstsOf, LOOKS_PER_TURN } from '../../src/nic/interrupts.ts';
import { NicRxQueue, type RxRing } from '../../src/nic/rx-queue.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';

const memory = mapAnonymous(4096);
afterAll(() => unmapMemory(memory));

/** Far more looks than the event loop may have to wait for. */
const MANY = 100 * LOOKS_PER_TURN;

/** Says when the event loop has had a turn. */
function nextTurn(): { over: boolean } {
  const turn = { over: false };
  setImmediate(() => {
    turn.over = true;
  });
  return turn;
}

describe('who waits for packets that keep coming', () => {
  it.each([
    ['each burst has some', 4],
    ['all of them are dropped on the way', 0],
  ])('leaves the event loop its turns when %s', async (_, received) => {
    const turn = nextTurn();
    let looks = 0;
    const source = {
      burst: () => {
        if (++looks > MANY) throw new Error('the event loop had no turn');
        return turn.over ? 1 : received;
      },
      wait: async () => true,
    };
    for await (const _packets of burstsOf(source, 4)) if (turn.over) break;
    expect(looks).toBeLessThan(MANY);
  });

  it('leaves the event loop its turns when it waits again and again', async () => {
    const ring: RxRing = {
      burst: () => 0,
      hasChains: false,
      networkHeader: () => 0,
      broken: null,
      counters: new Float64Array(0),
      enableInterrupts: () => true,
      disableInterrupts: () => {},
    };
    const ipsec = { state: new SaState(1, () => {}), software: null, device: null };
    const sleeper = { sleep: () => {}, wake: () => {} };
    const queue = new NicRxQueue(0, ring, new PacketPool(memory, { stride: 2048, headroom: 128 }), ipsec, { sleeper });
    const turn = nextTurn();
    let waits = 0;
    while (!turn.over && waits < MANY) {
      expect(await queue.wait()).toBe(true);
      waits++;
    }
    expect(waits).toBeLessThan(MANY);
  });
});
