import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { VipsecError, VirtioError } from '../../src/errors.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import type { SaHandle } from '../../src/ipsec/ipsec.ts';
import { type MoveFacts, planMove, SEQUENCE_GAP } from '../../src/ipsec/move-plan.ts';
import type { Where } from '../../src/ipsec/placement.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { AdminStatus } from '../../src/virtio/admin-wire.ts';
import { runs } from '../depth.ts';
import { refuse } from '../virtio-net/fake-admin.ts';
import { closeMoves, type MoveSetup, openForMoves } from './move-support.ts';
import { inbound, key, outbound } from './support.ts';

afterEach(closeMoves);

const code = (name: string) => expect.objectContaining({ code: name });
const gcm = (first: number) => ({ name: 'aes-gcm', key: key(16, first), salt: key(4), icvLength: 16 }) as const;
const newKey = { aead: gcm(0x90) };
const cbc: Partial<SecurityAssociation> = {
  cipher: { name: 'aes-cbc', key: key(16, 0x20) },
  auth: { name: 'hmac-sha256', key: key(32, 0x40), icvLength: 16 },
};
const esn = { esn: true, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false };
const inSoftware = { require: 'software' } as const;
const inDevice = { require: 'inline' } as const;

/** The SA object with that id as the device has it. */
function objectOf({ admin, manager }: MoveSetup, type: '0x203' | '0x204', id = 0) {
  const object = admin.objects.get(`${type}/${id}`);
  return object === undefined ? null : manager.inline!.wire.decodeSa(object.bytes);
}

describe('whether an SA may move with the key that it has', () => {
  const facts: MoveFacts = {
    direction: 'outbound',
    to: 'inline',
    sameKey: true,
    untouched: false,
    sequence: 100n,
    start: 1n,
    esn: true,
    windows: [0, 0],
    hasInitialSequence: true,
  };
  const cases: [string, Partial<MoveFacts>, bigint | 'given' | RegExp][] = [
    ['anything with a new key', { sameKey: false, direction: 'inbound', windows: [64, 64] }, 'given'],
    ['what has carried nothing', { untouched: true, hasInitialSequence: false, sequence: 1n }, 1n],
    ['what has carried nothing inline', { untouched: true, to: 'software', sequence: null, start: 7n }, 7n],
    ['outbound from the device', { to: 'software', sequence: null }, /only the device knows/],
    ['outbound to a device without initial sequence', { hasInitialSequence: false }, /cannot be told/],
    ['outbound to the draft', {}, 100n + SEQUENCE_GAP],
    ['outbound near the end of all numbers', { sequence: (1n << 64n) - SEQUENCE_GAP }, /too few/],
    ['outbound just before that', { sequence: (1n << 64n) - SEQUENCE_GAP - 1n }, (1n << 64n) - 1n],
    ['inbound with a window', { direction: 'inbound', windows: [64, 64] }, /replay window/],
    ['inbound that only now loses its window', { direction: 'inbound', windows: [64, 0] }, /replay window/],
    ['inbound that gets one', { direction: 'inbound', windows: [0, 64] }, /replay window/],
    ['inbound without window', { direction: 'inbound', esn: false, hasInitialSequence: false }, 0n],
    ['inbound to the draft with ESN', { direction: 'inbound', sequence: 5n << 32n }, 5n << 32n],
    ['inbound early in its numbers', { direction: 'inbound', hasInitialSequence: false }, 0n],
    ['inbound late', { direction: 'inbound', hasInitialSequence: false, sequence: 1n << 31n }, /high half/],
    ['inbound with ESN from the device', { direction: 'inbound', to: 'software', sequence: null }, /high half/],
  ];
  it.each(cases)('%s', (_name, change, expected) => {
    const plan = planMove({ ...facts, ...change });
    if (expected instanceof RegExp) expect(plan).toEqual({ refused: expect.stringMatching(expected) });
    else expect(plan).toEqual({ initial: expected });
  });
});

describe('an outbound SA', () => {
  it('goes to the device before it has sent anything, and stays what it is for packets', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inSoftware);
    await sa.move('inline', outbound());
    expect(sa.placement).toEqual({ where: 'inline', because: 'it was moved' });
    expect(objectOf(setup, '0x203')).toMatchObject({ spi: 0x1000 });
    expect(setup.send(sa.handle, 3)).toEqual([0, 0, 0]);
    expect(setup.sent.map(({ where, sequence }) => `${where} ${sequence}`)).toEqual([
      'inline 1',
      'inline 2',
      'inline 3',
    ]);
    expect(() => setup.manager.software?.counters(sa.handle)).toThrow(code('NO_SUCH_SA'));
    expect(sa.traffic().packets).toBe(3n);
  });

  it('comes back from the device when it has sent nothing, and begins at the beginning', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inDevice);
    await sa.move('software', outbound());
    expect(setup.admin.objects.has('0x203/0')).toBe(false);
    setup.send(sa.handle, 2);
    await expect(sa.move('inline', outbound())).rejects.toThrow(code('SA_MOVE'));
    setup.send(sa.handle, 1);
    expect(setup.sent.map(({ where, sequence }) => `${where} ${sequence}`)).toEqual([
      'software 1',
      'software 2',
      'software 3',
    ]);
    // What it used is remembered beyond its end.
    await sa.remove();
    await expect(setup.manager.addSa(outbound(), inDevice)).rejects.toThrow(code('NONCE_REUSE'));
    await setup.manager.addSa(outbound({ initial: { sequence: 4n } }), inSoftware);
  });

  it('never leaves the device with the key that it has sent with', async () => {
    const setup = await openForMoves();
    for (const change of [{}, cbc]) {
      const sa = await setup.manager.addSa(outbound(change), inDevice);
      setup.send(sa.handle, 1);
      await expect(sa.move('software', outbound(change))).rejects.toThrow(code('SA_MOVE'));
      expect(sa.placement.where).toBe('inline');
      expect(setup.send(sa.handle, 1)).toEqual([Verdict.ok]);
    }
  });

  it('moves with a new key at any time, and the old key is over', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inDevice);
    setup.send(sa.handle, 5);
    await sa.move('software', outbound(newKey));
    setup.send(sa.handle, 2);
    expect(setup.sent.at(-1)).toMatchObject({ where: 'software', sequence: 2n });
    expect(sa.traffic().packets).toBe(7n);
    await expect(setup.manager.addSa(outbound({ spi: 9 }))).rejects.toThrow(code('NONCE_REUSE'));
    await expect(sa.move('inline', outbound())).rejects.toThrow(code('NONCE_REUSE'));
    await sa.move('inline', outbound({ aead: gcm(0xa0) }));
    await expect(sa.move('software', outbound(newKey))).rejects.toThrow(code('NONCE_REUSE'));
    expect(setup.send(sa.handle, 1)).toEqual([Verdict.ok]);
    await sa.remove();
    const late = outbound({ ...newKey, initial: { sequence: 3n } });
    await setup.manager.addSa(late, inSoftware);
  });

  it('is refused the device when an SA before it has used the key', async () => {
    const setup = await openForMoves('rfc-2025-01');
    const first = await setup.manager.addSa(outbound({ options: esn }), inSoftware);
    setup.send(first.handle, 4);
    await first.remove();
    const again = outbound({ options: esn, initial: { sequence: 5n } });
    const sa = await setup.manager.addSa(again, inSoftware);
    await expect(sa.move('inline', again)).rejects.toThrow(code('NONCE_REUSE'));
    setup.send(sa.handle, 1);
    expect(setup.sent.at(-1)).toMatchObject({ sequence: 5n, where: 'software' });
  });

  it('stays where it is when a packet passes while the device is being told', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inSoftware);
    setup.admin.fail = (what) => {
      if (what.startsWith('create 0x203')) setup.send(sa.handle, 1);
      return null;
    };
    await expect(sa.move('inline', outbound())).rejects.toThrow(code('SA_MOVE'));
    expect(sa.placement.where).toBe('software');
    expect(setup.admin.objects.has('0x203/0')).toBe(false);
    setup.send(sa.handle, 1);
    expect(setup.sent.map(({ sequence }) => sequence)).toEqual([1n, 2n]);
  });

  it.each(['refused', 'silent'] as const)('stays where it is when the device is %s', async (how) => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inSoftware);
    setup.admin.fail = () =>
      how === 'refused' ? refuse(0xa, AdminStatus.ENOSPC) : new VirtioError('ADMIN_TIMEOUT', 'late');
    await expect(sa.move('inline', outbound())).rejects.toThrow(
      code(how === 'refused' ? 'ADMIN_REFUSED' : 'ADMIN_TIMEOUT'),
    );
    expect(sa.placement.where).toBe('software');
    expect(setup.send(sa.handle, 2)).toEqual([0, 0]);
    expect(setup.sent.map(({ sequence }) => sequence)).toEqual([1n, 2n]);
  });

  it('goes to a device of the draft beyond what it sends meanwhile, losing nothing, when its IVs do not count', async () => {
    const setup = await openForMoves('rfc-2025-01');
    const sa = await setup.manager.addSa(outbound({ ...cbc, options: esn }), inSoftware);
    setup.send(sa.handle, 10);
    setup.admin.fail = (what) => {
      if (what.startsWith('create 0x203')) expect(setup.send(sa.handle, 5)).toEqual([0, 0, 0, 0, 0]);
      return null;
    };
    await sa.move('inline', outbound({ ...cbc, options: esn }));
    setup.send(sa.handle, 1);
    expect(setup.sent.at(-2)).toMatchObject({ where: 'software', sequence: 15n });
    expect(setup.sent.at(-1)).toMatchObject({ where: 'inline', sequence: 11n + SEQUENCE_GAP });
    expect(sa.traffic().packets).toBe(16n);
    await expect(sa.move('software', outbound({ ...cbc, options: esn }))).rejects.toThrow(code('SA_MOVE'));
  });

  it('does not go there without ESN, which the object needs for its number', async () => {
    const setup = await openForMoves('rfc-2025-01');
    const sa = await setup.manager.addSa(outbound(cbc), inSoftware);
    setup.send(sa.handle, 1);
    await expect(sa.move('inline', outbound(cbc))).rejects.toThrow(code('NOT_OFFLOADABLE'));
    setup.send(sa.handle, 1);
    expect(setup.sent.at(-1)).toMatchObject({ sequence: 2n, where: 'software' });
  });

  it('goes there in a counter mode only when the device is known to use sequence numbers as IVs', async () => {
    const setup = await openForMoves('rfc-2025-01');
    const sa = await setup.manager.addSa(outbound({ options: esn }), inSoftware);
    setup.send(sa.handle, 10);
    await expect(sa.move('inline', outbound({ options: esn }))).rejects.toThrow(code('NONCE_REUSE'));
    await sa.move('inline', outbound({ options: esn }), { deviceIvIsSequence: true });
    setup.send(sa.handle, 1);
    expect(setup.sent.at(-1)).toMatchObject({ where: 'inline', iv: 11n + SEQUENCE_GAP });
  });

  it('is not taken at its word where its IVs were ahead of its numbers', async () => {
    const setup = await openForMoves('rfc-2025-01');
    const iv = Uint8Array.of(0, 0, 0, 0, 0xff, 0, 0, 0);
    const sa = await setup.manager.addSa(outbound({ options: esn, initial: { sequence: 1n, iv } }), inSoftware);
    setup.send(sa.handle, 1);
    const asked = sa.move('inline', outbound({ options: esn }), { deviceIvIsSequence: true });
    await expect(asked).rejects.toThrow(code('NONCE_REUSE'));
  });

  it('is refused a place that cannot have it, another SPI, and where it is already', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inSoftware);
    await expect(sa.move('inline', outbound({ spi: 2 }))).rejects.toThrow(code('SA_MODIFY'));
    await expect(sa.move('software', outbound())).rejects.toThrow(code('SA_MOVE'));
    await expect(sa.move('inline', outbound({ tfcPadding: 10 }))).rejects.toThrow(code('NOT_OFFLOADABLE'));
    await sa.remove();
    await expect(sa.move('inline', outbound())).rejects.toThrow(code('NO_SUCH_SA'));
  });

  it('ends a move that is under way before it is removed or moved again', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inSoftware);
    const there = sa.move('inline', outbound());
    const back = sa.move('software', outbound());
    const gone = sa.remove();
    await Promise.all([there, back, gone]);
    expect(
      setup.admin.objects.size - [...setup.admin.objects.keys()].filter((one) => !one.startsWith('0x203')).length,
    ).toBe(0);
    expect(setup.manager.list()).toEqual([]);
    await setup.manager.addSa(outbound(), inSoftware);
  });

  it('is modified and moved in the order in which it was asked, with the keys that go with it', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inDevice);
    setup.send(sa.handle, 1);
    const first = sa.modify(outbound(newKey));
    const second = sa.move('software', outbound({ aead: gcm(0xa0) }));
    const third = sa.modify(outbound({ aead: gcm(0xa0), lifetime: { ...outbound().lifetime, hardPackets: 100n } }));
    await Promise.all([first, second, third]);
    expect(sa.placement.where).toBe('software');
    setup.send(sa.handle, 2);
    expect(setup.sent.map(({ sequence }) => sequence)).toEqual([1n, 1n, 2n]);
    for (const used of [{}, newKey, { aead: gcm(0xa0) }]) {
      await expect(setup.manager.addSa(outbound({ spi: 9, ...used }))).rejects.toThrow(code('NONCE_REUSE'));
    }
    await sa.remove();
    await setup.manager.addSa(outbound({ aead: gcm(0xa0), initial: { sequence: 3n } }), inSoftware);
  });

  it('has one modify or move at a time, however many wait', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inDevice);
    let running = 0;
    let most = 0;
    const { modifyObject } = setup.admin;
    setup.admin.modifyObject = async (...all) => {
      most = Math.max(most, ++running);
      await modifyObject.apply(setup.admin, all);
      running--;
    };
    await Promise.all([0x60, 0x90, 0xa0, 0xb0].map((first) => sa.modify(outbound({ aead: gcm(first) }))));
    expect(most).toBe(1);
  });

  it('has no place after a move that the end of the NIC overtook', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(outbound(), inSoftware);
    const moving = sa.move('inline', outbound());
    setup.manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    await expect(moving).rejects.toThrow(code('NIC_CLOSED'));
    expect(setup.send(sa.handle, 1)).toEqual([Verdict.noSa]);
  });
});

describe('an inbound SA', () => {
  it('goes to the device and back as long as it has accepted nothing', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(inbound(), inSoftware);
    await sa.move('inline', inbound());
    expect(objectOf(setup, '0x204')).toMatchObject({ replayWindow: 64 });
    expect(setup.table.handle[0]).toBe(sa.handle);
    expect(setup.receive(inbound(), 1n)).toBe(Verdict.noSa);
    await sa.move('software', inbound());
    expect(setup.table.handle[0]).toBe(0);
    expect([...setup.admin.objects.keys()].some((one) => one.startsWith('0x204') || one.startsWith('0x202'))).toBe(
      false,
    );
    expect(setup.receive(inbound(), 1n)).toBe(Verdict.ok);
    expect(setup.receive(inbound(), 1n)).toBe(Verdict.replay);
    await expect(sa.move('inline', inbound())).rejects.toThrow(code('SA_MOVE'));
  });

  it('does not leave its replay window behind, from either place', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(inbound(), inSoftware);
    setup.receive(inbound(), 5n);
    await expect(sa.move('inline', inbound())).rejects.toThrow(code('SA_MOVE'));
    await expect(sa.move('inline', inbound({ replayWindow: 0 }))).rejects.toThrow(code('SA_MOVE'));
    expect(setup.receive(inbound(), 5n)).toBe(Verdict.replay);
    const other = await setup.manager.addSa(inbound({ spi: 2, ...newKey }), inDevice);
    setup.manager.state.countInbound(other.handle, 1, 28);
    await expect(other.move('software', inbound({ spi: 2, ...newKey }))).rejects.toThrow(code('SA_MOVE'));
    expect(setup.table.handle[0]).toBe(other.handle);
  });

  it('moves without a replay window, which its user has done without all along, and its limits go along', async () => {
    const setup = await openForMoves();
    const lifetime = { softPackets: 3n, hardPackets: 10n, softBytes: 0n, hardBytes: 1000n };
    const is = inbound({ replayWindow: 0, lifetime });
    const sa = await setup.manager.addSa(is, inSoftware);
    for (let n = 1n; n <= 4n; n++) expect(setup.receive(is, n)).toBe(Verdict.ok);
    await sa.move('inline', is);
    expect(objectOf(setup, '0x204')).toMatchObject({ softPackets: 0n, hardPackets: 6n, hardBytes: 1000n - 4n * 28n });
    setup.manager.state.countInbound(sa.handle, 2, 56);
    await sa.move('software', is);
    const verdicts = [5n, 6n, 7n, 8n, 9n].map((n) => setup.receive(is, n));
    expect(verdicts).toEqual([0, 0, 0, 0, Verdict.expired]);
    expect(sa.traffic()).toMatchObject({ packets: 10n, softExpired: true });
    await expect(sa.move('inline', is)).rejects.toThrow(code('SA_MOVE'));
  });

  it('counts nothing as secured that the device opens before the switch, and stays when software accepts one meanwhile', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(inbound(), inSoftware);
    const handles: number[] = [];
    setup.admin.fail = (what) => {
      handles.push(setup.table.handle[0]);
      if (what.startsWith('create 0x202')) expect(setup.receive(inbound(), 9n)).toBe(Verdict.ok);
      return null;
    };
    await expect(sa.move('inline', inbound())).rejects.toThrow(code('SA_MOVE'));
    expect(new Set(handles)).toEqual(new Set([0]));
    expect(sa.placement.where).toBe('software');
    expect(setup.receive(inbound(), 9n)).toBe(Verdict.replay);
    expect(setup.receive(inbound(), 10n)).toBe(Verdict.ok);
  });

  it('needs the place of its SPI for itself', async () => {
    const setup = await openForMoves();
    const to = (last: number) => ({ ...inbound().tunnel!, destination: Uint8Array.of(192, 0, 2, last) });
    const first = await setup.manager.addSa(inbound({ tunnel: to(2) }), inSoftware);
    const twin = await setup.manager.addSa(inbound({ tunnel: to(3), ...newKey }), inSoftware);
    await expect(first.move('inline', inbound({ tunnel: to(2) }))).rejects.toThrow(code('NOT_OFFLOADABLE'));
    await twin.remove();
    await first.move('inline', inbound({ tunnel: to(2) }));
  });

  it('begins anew with a new key', async () => {
    const setup = await openForMoves();
    const sa = await setup.manager.addSa(inbound(), inSoftware);
    setup.receive(inbound(), 5n);
    await sa.move('inline', inbound(newKey));
    setup.manager.state.countInbound(sa.handle, 1, 28);
    await sa.move('software', inbound({ aead: gcm(0xb0) }));
    expect(setup.receive(inbound({ aead: gcm(0xb0) }), 1n)).toBe(Verdict.ok);
    expect(setup.receive(inbound(), 6n)).toBe(Verdict.icv);
  });
});

describe('nonces', () => {
  type Step =
    | { do: 'send'; n: number }
    | { do: 'move'; to: Where; key: number | null; known: boolean }
    | { do: 'modify'; key: number }
    | { do: 'again'; key: number; where: Where; from: bigint };
  const keyNumber = fc.nat({ max: 4 });
  const sameOrOther = fc.oneof(fc.constant(null), keyNumber);
  const place = fc.constantFrom<Where>('inline', 'software');
  const step: fc.Arbitrary<Step> = fc.oneof(
    fc.record({ do: fc.constant('send' as const), n: fc.integer({ min: 1, max: 4 }) }),
    fc.record({ do: fc.constant('move' as const), to: place, key: sameOrOther, known: fc.boolean() }),
    fc.record({ do: fc.constant('modify' as const), key: keyNumber }),
    fc.record({ do: fc.constant('again' as const), key: keyNumber, where: place, from: fc.bigInt(1n, 12n) }),
  );

  /** Found by the property: a key that has sent in software, moved to the device, sent nothing there and was left, came back at 1. */
  const leftUnused: Step[] = [
    { do: 'again', key: 4, where: 'software', from: 1n },
    { do: 'send', n: 1 },
    { do: 'move', to: 'inline', key: null, known: true },
    { do: 'move', to: 'software', key: 0, known: false },
    { do: 'move', to: 'inline', key: 4, known: false },
    { do: 'send', n: 1 },
  ];

  it.each(['virtio-1.4', 'rfc-2025-01'] as const)(
    'never repeat on %s, whatever is moved, modified, removed and made again with whichever keys',
    async (revision) => {
      let moves = 0;
      await fc.assert(
        fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 40 }), async (steps) => {
          const setup = await openForMoves(revision);
          const make = (number: number, sequence = 1n) =>
            outbound({ aead: gcm(0x10 + 0x20 * number), options: esn, initial: { sequence } });
          const seen = new Set<string>();
          let sa: SaHandle | null = null;
          let current = 0;
          for (const one of steps) {
            try {
              if (one.do === 'send' && sa !== null) {
                for (let i = 0; i < one.n; i++) {
                  setup.send(sa.handle, 1);
                  const nonce = `${current} ${setup.sent.at(-1)?.iv}`;
                  expect(seen.has(nonce), nonce).toBe(false);
                  seen.add(nonce);
                }
              } else if (one.do === 'move' && sa !== null) {
                // The device in memory does use sequence numbers as IVs, so that the promise may be given.
                const next = one.key ?? current;
                await sa.move(one.to, make(next), { deviceIvIsSequence: one.known });
                current = next;
                moves++;
              } else if (one.do === 'modify' && sa !== null) {
                await sa.modify(make(one.key));
                current = one.key;
              } else if (one.do === 'again') {
                await sa?.remove();
                sa = null;
                sa = await setup.manager.addSa(make(one.key, one.from), { require: one.where });
                current = one.key;
              }
            } catch (error) {
              if (!(error instanceof VipsecError)) throw error;
            }
          }
          closeMoves();
        }),
        { numRuns: runs(1000), examples: revision === 'virtio-1.4' ? [] : [[leftUnused]] },
      );
      expect(moves).toBeGreaterThan(20);
    },
    60_000,
  );
});

describe('the wire revisions', () => {
  it('differ in whether a device can be told a first sequence number', () => {
    expect([ipsecWire('virtio-1.4').hasInitialSequence, ipsecWire('rfc-2025-01').hasInitialSequence]).toEqual([
      false,
      true,
    ]);
  });
});
