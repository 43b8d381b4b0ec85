/**
 * No nonce twice on the wire, whatever is done to SAs and whatever fails: made, modified, moved, removed, made again with the same keys
 * in other places, with a device that refuses, falls silent or loses its answers, and over restarts of the process, clean or not.
 *
 * The recorder knows nothing of the guard: of a packet of software it finds out by which of all keys it opens (node:crypto); of a packet of
 * the device, from the bytes of the object that the device has. The device is the worst one: with each object that it is given it begins
 * anew, and its IVs are its sequence numbers.
 */
import { createDecipheriv } from 'node:crypto';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { VipsecError, VirtioError } from '../../src/errors.ts';
import type { SaHandle } from '../../src/ipsec/ipsec.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import type { Where } from '../../src/ipsec/placement.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { AdminOpcode, AdminStatus } from '../../src/virtio/admin-wire.ts';
import type { WireRevision } from '../../src/virtio/revision.ts';
import { runs } from '../depth.ts';
import { refuse } from '../virtio-net/fake-admin.ts';
import { closeMoves, type Evidence, ipPacket, type MoveSetup, openForMoves } from './move-support.ts';
import { key, outbound } from './support.ts';

afterEach(closeMoves);

/** Where files are in memory: a nonce file is flushed to its disk again and again. */
const MEMORY = '/dev/shm';
const KEYS = [0x10, 0x30, 0x50, 0x70, 0x90, 0xb0].map((first) => key(16, first));
/** With the salt of GCM and CTR that of CCM makes the same counter blocks: they begin with 3 there (RFC 3610, 2.3). */
const SALT = Uint8Array.of(3, 0xa1, 0xa2, 0xa3);
const CCM_SALT = SALT.subarray(1);
const SLOTS = 3;
const options = { esn: true, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false };

/** What an SA is made with: a key, an algorithm, with CTR which of two authenticators, the first sequence number, and the first IV if it is to differ. */
interface Wish {
  readonly key: number;
  readonly mode: 'gcm' | 'ccm' | 'ctr';
  readonly auth: 0 | 1;
  readonly sequence: bigint;
  readonly iv: bigint | null;
}

function sa({ key: number, mode, auth, sequence, iv }: Wish, slot: number): SecurityAssociation {
  const bytes = KEYS[number].slice();
  const initial = { sequence, ...(iv === null ? {} : { iv: be64(iv) }) };
  const salt = mode === 'ccm' ? CCM_SALT.slice() : SALT.slice();
  const algorithms: Partial<SecurityAssociation> =
    mode === 'ctr'
      ? {
          cipher: { name: 'aes-ctr', key: bytes, salt },
          auth: { name: 'hmac-sha256', key: key(32, 0x60 + auth), icvLength: 16 },
        }
      : { aead: { name: `aes-${mode}`, key: bytes, salt, icvLength: 16 } };
  return outbound({ ...algorithms, spi: 0x1000 + slot, options, initial });
}

function be64(value: bigint): Uint8Array {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(value);
  return bytes;
}

/** Places in an outer IPv4 packet with ESP, and in SA objects (5.9.9.9.3 and the draft). */
const Packet = { esp: 20, sequence: 24, iv: 28, text: 36, icv: 16 } as const;
const ObjectKey = { 'virtio-1.4': 88, 'rfc-2025-01': 92 } as const;

/** What stands first in every packet. */
const TEXT = ipPacket().subarray(0, 16);

/** Which of all keys a packet was made with; -1 when none opens it. */
function keyOf(packet: Buffer): number {
  return KEYS.findIndex((bytes) => {
    // The text begins with the counter at 1 in CTR and CCM, whose blocks are the same here, and at 2 in GCM.
    if (beginsAt(1, packet, bytes)) return true;
    return beginsAt(2, packet, bytes) && opensAsGcm(packet, bytes);
  });
}

function beginsAt(counter: number, packet: Buffer, bytes: Uint8Array): boolean {
  const block = Buffer.concat([SALT, packet.subarray(Packet.iv, Packet.text), Buffer.from([0, 0, 0, counter])]);
  return createDecipheriv('aes-128-ctr', bytes, block)
    .update(packet.subarray(Packet.text, Packet.text + 16))
    .equals(TEXT);
}

/** Upper halves of the sequence numbers that there are; packets carry the lower ones only (RFC 4304). */
const HIGH = [0, 2].map((high) => Buffer.from([0, 0, 0, high]));

function opensAsGcm(packet: Buffer, bytes: Uint8Array): boolean {
  const text = packet.subarray(Packet.text, packet.length - Packet.icv);
  return HIGH.some((high) => {
    const nonce = Buffer.concat([SALT, packet.subarray(Packet.iv, Packet.text)]);
    const spi = packet.subarray(Packet.esp, Packet.sequence);
    const opening = createDecipheriv('aes-128-gcm', bytes, nonce);
    opening.setAAD(Buffer.concat([spi, high, packet.subarray(Packet.sequence, Packet.iv)]));
    opening.setAuthTag(packet.subarray(packet.length - Packet.icv));
    try {
      opening.update(text);
      opening.final();
      return true;
    } catch {
      return false;
    }
  });
}

type Failure = 'refuse' | 'silent' | 'lost';
type Step =
  | { readonly do: 'add'; readonly slot: number; readonly wish: Wish; readonly where: Where | null }
  | { readonly do: 'send'; readonly slot: number; readonly n: number }
  | { readonly do: 'move'; readonly slot: number; readonly wish: Wish; readonly to: Where; readonly known: boolean }
  | { readonly do: 'modify'; readonly slot: number; readonly wish: Wish }
  | { readonly do: 'remove'; readonly slot: number }
  | { readonly do: 'fail'; readonly after: number; readonly how: Failure }
  | { readonly do: 'restart'; readonly clean: boolean };

const slot = fc.nat({ max: SLOTS - 1 });
const where = fc.constantFrom<Where>('inline', 'software');
const wish: fc.Arbitrary<Wish> = fc.record({
  // Few, so that they meet again.
  key: fc.nat({ max: 2 }),
  mode: fc.constantFrom('gcm', 'ccm', 'ctr'),
  auth: fc.constantFrom(0, 1),
  sequence: fc.oneof(fc.constant(1n), fc.bigInt(1n, 12n), fc.constant(1n << 33n)),
  iv: fc.option(fc.oneof(fc.bigInt(0n, 20n), fc.constant((1n << 64n) - 4n)), { nil: null, freq: 3 }),
});
const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 5, arbitrary: fc.record({ do: fc.constant('add' as const), slot, wish, where: fc.option(where) }) },
  { weight: 8, arbitrary: fc.record({ do: fc.constant('send' as const), slot, n: fc.integer({ min: 1, max: 4 }) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant('move' as const), slot, wish, to: where, known: fc.boolean() }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant('modify' as const), slot, wish }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('remove' as const), slot }) },
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant('fail' as const),
      after: fc.constantFrom(0, 0, 0, 1, 1, 2),
      how: fc.constantFrom<Failure>('refuse', 'silent', 'lost'),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('restart' as const), clean: fc.boolean() }) },
);

/** One history: processes one after the other, which share nothing but the nonce file. */
class History {
  readonly done: Record<string, number> = {};
  packets = 0;
  readonly #seen = new Set<string>();
  readonly #path: string;
  readonly #revision: WireRevision;
  readonly #sas: (SaHandle | null)[] = new Array<SaHandle | null>(SLOTS).fill(null);
  #setup: MoveSetup | null = null;
  #guard: NonceGuard | null = null;

  constructor(path: string, revision: WireRevision) {
    this.#path = path;
    this.#revision = revision;
  }

  async start(): Promise<void> {
    this.#guard = new NonceGuard({ path: this.#path, memory: new NonceMemory() });
    this.#setup = await openForMoves(this.#revision, this.#guard, (evidence) => this.#record(evidence));
    this.#sas.fill(null);
  }

  get #live(): MoveSetup {
    if (this.#setup === null) throw new Error('not started');
    return this.#setup;
  }

  /** The independent judge. */
  #record({ where: place, iv, bytes }: Evidence): void {
    const packet = Buffer.from(bytes);
    const at = ObjectKey[this.#revision];
    const number =
      place === 'software' ? keyOf(packet) : KEYS.findIndex((one) => packet.subarray(at, at + 16).equals(one));
    expect(number, 'a packet that no key opens').toBeGreaterThanOrEqual(0);
    const nonce = `key ${number}, IV ${iv}`;
    expect(this.#seen.has(nonce), `${nonce} twice`).toBe(false);
    this.#seen.add(nonce);
    this.packets++;
  }

  async apply(step: Step): Promise<void> {
    try {
      await this.#apply(step);
      this.done[step.do] = (this.done[step.do] ?? 0) + 1;
    } catch (error) {
      if (!(error instanceof VipsecError)) throw error;
      this.done[error.code] = (this.done[error.code] ?? 0) + 1;
    }
  }

  async #apply(step: Step): Promise<void> {
    if (step.do === 'fail') this.#failLater(step.after, step.how);
    else if (step.do === 'restart') await this.#restart(step.clean);
    else if (step.do === 'add') {
      const old = this.#sas[step.slot];
      this.#sas[step.slot] = null;
      await old?.remove();
      const require = step.where === null ? {} : { require: step.where };
      this.#sas[step.slot] = await this.#live.manager.addSa(sa(step.wish, step.slot), require);
    } else {
      const handle = this.#sas[step.slot];
      if (handle === null) return;
      if (step.do === 'send') this.#live.send(handle.handle, step.n);
      else if (step.do === 'move') {
        await handle.move(step.to, sa(step.wish, step.slot), { deviceIvIsSequence: step.known });
      } else if (step.do === 'modify') await handle.modify(sa(step.wish, step.slot));
      else {
        this.#sas[step.slot] = null;
        await handle.remove();
      }
    }
  }

  /** One of the next commands is refused, or not heard; or done, and the answer lost. */
  #failLater(after: number, how: Failure): void {
    const { admin } = this.#live;
    let left = after;
    const strikes = () => left-- === 0;
    const silence = () => new VirtioError('ADMIN_TIMEOUT', 'no answer');
    if (how !== 'lost') {
      const error = how === 'refuse' ? refuse(AdminOpcode.RESOURCE_OBJ_CREATE, AdminStatus.ENOMEM) : silence();
      admin.fail = () => (strikes() ? error : null);
      return;
    }
    admin.fail = () => null;
    for (const name of ['createObject', 'modifyObject', 'destroyObject'] as const) {
      const whole = Reflect.get(Object.getPrototypeOf(admin), name) as (...args: unknown[]) => Promise<void>;
      Reflect.set(admin, name, async (...args: unknown[]) => {
        await whole.apply(admin, args);
        if (strikes()) throw silence();
      });
    }
  }

  /** A process that crashes releases nothing, and its device is reset by the next one. */
  async #restart(clean: boolean): Promise<void> {
    if (clean) {
      this.#live.manager.close(new VirtioError('NIC_CLOSED', 'closed'));
      this.#guard?.close();
    }
    await this.start();
  }
}

describe.each(['virtio-1.4', 'rfc-2025-01'] as const)('nonces on %s', (revision) => {
  it('are never used twice, whatever is done and whatever fails', async () => {
    const folder = mkdtempSync(join(existsSync(MEMORY) ? MEMORY : tmpdir(), 'vipsec-nonces-'));
    const total: Record<string, number> = {};
    let packets = 0;
    let file = 0;
    try {
      await fc.assert(
        fc.asyncProperty(fc.array(step, { minLength: 5, maxLength: 50 }), async (steps) => {
          const history = new History(join(folder, `${file++}`), revision);
          await history.start();
          for (const one of steps) await history.apply(one);
          packets += history.packets;
          for (const [name, count] of Object.entries(history.done)) total[name] = (total[name] ?? 0) + count;
          closeMoves();
        }),
        { numRuns: runs(600), examples: EXAMPLES.map((steps) => [steps]) },
      );
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
    // The history is one in which things happen.
    expect(packets).toBeGreaterThan(500);
    for (const name of ['add', 'send', 'move', 'modify', 'remove', 'fail', 'restart', 'NONCE_REUSE', 'ADMIN_TIMEOUT']) {
      expect(total[name], name).toBeGreaterThan(2);
    }
  }, 300_000);
});

/** Histories that are worth to be tried every time. */
const EXAMPLES: readonly Step[][] = [
  // A key that was used comes back behind its last IV, and goes to a device that takes its numbers for IVs.
  [
    { do: 'add', slot: 0, wish: { key: 0, mode: 'gcm', auth: 0, sequence: 1n, iv: null }, where: 'software' },
    { do: 'send', slot: 0, n: 4 },
    { do: 'remove', slot: 0 },
    { do: 'add', slot: 0, wish: { key: 0, mode: 'gcm', auth: 0, sequence: 1n, iv: 15n }, where: 'software' },
    { do: 'move', slot: 0, wish: { key: 0, mode: 'gcm', auth: 0, sequence: 1n, iv: null }, to: 'inline', known: true },
    { do: 'send', slot: 0, n: 4 },
  ],
  // Found here: an SA moves and keeps the key of its authenticator, but gets a used one for its cipher.
  [
    { do: 'add', slot: 0, wish: { key: 5, mode: 'gcm', auth: 0, sequence: 1n, iv: null }, where: 'inline' },
    { do: 'send', slot: 0, n: 1 },
    { do: 'add', slot: 0, wish: { key: 0, mode: 'ctr', auth: 0, sequence: 1n, iv: null }, where: 'inline' },
    {
      do: 'move',
      slot: 0,
      wish: { key: 5, mode: 'ctr', auth: 0, sequence: 1n, iv: null },
      to: 'software',
      known: false,
    },
    { do: 'send', slot: 0, n: 1 },
  ],
  // The same in place: the numbers go on, so it does not begin where the new parameters say.
  [
    { do: 'add', slot: 0, wish: { key: 0, mode: 'ctr', auth: 0, sequence: 1n, iv: null }, where: 'software' },
    { do: 'send', slot: 0, n: 4 },
    { do: 'add', slot: 0, wish: { key: 1, mode: 'ctr', auth: 0, sequence: 1n, iv: null }, where: 'software' },
    { do: 'send', slot: 0, n: 1 },
    { do: 'modify', slot: 0, wish: { key: 0, mode: 'ctr', auth: 0, sequence: 10n, iv: null } },
    { do: 'send', slot: 0, n: 2 },
  ],
  // And the IVs of the key before do not go on under the new one, of which nobody would know.
  [
    { do: 'add', slot: 0, wish: { key: 0, mode: 'ctr', auth: 0, sequence: 1n, iv: 15n }, where: 'software' },
    { do: 'send', slot: 0, n: 1 },
    { do: 'modify', slot: 0, wish: { key: 1, mode: 'ctr', auth: 0, sequence: 1n, iv: null } },
    { do: 'send', slot: 0, n: 2 },
    { do: 'remove', slot: 0 },
    { do: 'add', slot: 0, wish: { key: 1, mode: 'ctr', auth: 0, sequence: 12n, iv: null }, where: 'software' },
    { do: 'send', slot: 0, n: 4 },
    { do: 'send', slot: 0, n: 4 },
  ],
];
