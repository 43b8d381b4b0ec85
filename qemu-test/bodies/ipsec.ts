/**
 * What an application does with IPsec: adds an SA each way, sends packets under them over a wire that brings everything back, has its
 * packets again under the other SA; wherever the SAs run, the code is the same. Whether what is on the wire is right is for Linux to say, in
 * `interop.ts`; that it is IPsec, the wire says here.
 */
import {
  type Nic,
  type NicOptions,
  openFunction,
  openNic,
  type SaHandle,
  type SecurityAssociationInput,
  type Where,
} from '../../src/index.ts';
import { mustFail, same } from '../guest/guest.ts';
import { poll } from './frames.ts';
import { ETHERNET, isIpv4, udpFrame } from './packets.ts';
import type { Place } from './place.ts';

/** Of different lengths. */
const PACKETS = 100;
/** After a reset, and whenever the NIC was opened again. */
const PACKETS_AGAIN = 16;
const IN_FLIGHT = 64;
/** Bursts are of 1 to this many. */
const LONGEST_BURST = 8;
const TIMEOUT_MS = 20_000;
const SPI = 0x2000;
const ROUNDS = 2;
const LONGEST_PAYLOAD = 1300;

export const IpsecCheck = {
  placement: 'SAs run where they should, and the reason is told',
  traffic: 'packets leave under one SA and arrive under the other, byte for byte',
  wire: 'all of them were IPsec on the wire',
  clear: 'a packet without an SA stays in the clear',
  nonce: 'the same key again is refused',
  flr: 'a function-level reset ends all SAs; a new driver starts from nothing',
  again: 'again and again: open, SAs, traffic, close',
} as const;

/**
 * `where` is where the SAs are to run on a NIC that is opened with `options`. The wire must be one that loops. `look` is given the NIC when
 * it was opened first, for checks of the caller's.
 */
export async function ipsecBody(
  place: Place,
  where: Where,
  options: NicOptions = {},
  look?: (nic: Nic) => Promise<void>,
): Promise<void> {
  const { address } = place;
  await place.wire({ kind: 'echo', how: 'loop' });
  let nic = await openNic(address, options);
  await look?.(nic);
  const sas = await addPair(nic, 0);
  await place.check(IpsecCheck.placement, () => {
    same('where', places(sas), [where, where]);
    return sas[0].placement.because;
  });
  await place.wire({ kind: 'seen' });
  await place.check(IpsecCheck.traffic, () => loop(nic, sas, PACKETS));
  await place.check(IpsecCheck.wire, async () => {
    const { ipsec, clear } = await place.wire({ kind: 'seen' });
    same('IPsec and other packets', [ipsec, clear], [PACKETS, 0]);
  });
  await place.check(IpsecCheck.clear, async () => {
    await loop(nic, undefined, PACKETS);
    const { ipsec, clear } = await place.wire({ kind: 'seen' });
    same('IPsec and other packets', [ipsec, clear], [0, PACKETS]);
  });
  await place.check(IpsecCheck.nonce, () => mustFail('NONCE_REUSE', () => nic.ipsec.addSa(outbound(nic, 0, SPI + 99))));
  await nic.close();
  await place.check(IpsecCheck.flr, async () => {
    const fn = openFunction(address);
    fn.reset();
    fn.close();
    nic = await openNic(address, options);
    same('SAs', nic.ipsec.list().length, 0);
    await loop(nic, await addPair(nic, 1), PACKETS_AGAIN);
    await nic.close();
  });
  await place.check(IpsecCheck.again, async () => {
    for (let round = 2; round < 2 + ROUNDS; round++) {
      nic = await openNic(address, options);
      const pair = await addPair(nic, round);
      same('where', places(pair), [where, where]);
      await loop(nic, pair, PACKETS_AGAIN);
      await nic.close();
    }
    return `${ROUNDS} times`;
  });
  await place.wire({ kind: 'echo', how: 'off' });
}

const places = (sas: readonly SaHandle[]) => sas.map((sa) => sa.placement.where);

const keys = new WeakMap<Nic, Map<number, string>>();
let made = 0;

/** A key of its own for each round on each open NIC: the guard refuses one that was used. */
export function keyOf(nic: Nic, round: number): string {
  const rounds = keys.get(nic) ?? new Map<number, string>();
  keys.set(nic, rounds);
  const key = rounds.get(round) ?? (0x5a + made++).toString(16).padStart(4, '0').repeat(8);
  rounds.set(round, key);
  return key;
}

function outbound(nic: Nic, round: number, spi: number): SecurityAssociationInput {
  return {
    direction: 'outbound',
    mode: 'tunnel',
    spi,
    aead: { name: 'aes-gcm', key: keyOf(nic, round), salt: 'a1b2c3d4' },
    tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
  };
}

/** An outbound SA and the inbound one that opens what it protects. */
export async function addPair(nic: Nic, round: number): Promise<[SaHandle, SaHandle]> {
  const out = outbound(nic, round, SPI + round);
  return [await nic.ipsec.addSa(out), await nic.ipsec.addSa({ ...out, direction: 'inbound' })];
}

/** Sends `count` UDP packets of all sizes and expects each back as it was, under the inbound SA or (without SAs) in the clear. */
async function loop(nic: Nic, sas: readonly [SaHandle, SaHandle] | undefined, count: number): Promise<string> {
  const { packets, queues } = nic;
  const [{ rx, tx }] = queues;
  const burst = new Uint32Array(IN_FLIGHT);
  const wanted = Array.from({ length: count }, (_, index) => packet(index));
  let sent = 0;
  let received = 0;
  await poll(
    () => {
      if (nic.broken !== null) throw nic.broken;
      tx.reclaim();
      const room = Math.min(count - sent, IN_FLIGHT - (sent - received), 1 + (sent % LONGEST_BURST), tx.room);
      const ready = packets.allocate(burst, room);
      for (let i = 0; i < ready; i++) {
        packets.write(burst[i], wanted[sent + i]);
        packets.sa[burst[i]] = sas?.[0].handle ?? 0;
      }
      const taken = tx.burst(burst, ready);
      packets.free(burst.subarray(taken), ready - taken);
      sent += taken;
      const n = rx.burst(burst, burst.length);
      for (let i = 0; i < n; i++) {
        const frame = packets.read(burst[i]);
        if (!isIpv4(frame)) continue;
        if (received === count) throw new Error(`more than ${count} packets came back`);
        same(`SA of packet ${received}`, packets.sa[burst[i]], sas?.[1].handle ?? 0);
        // The Ethernet header is not the SA's business.
        if (!wanted[received].subarray(ETHERNET).equals(frame.subarray(ETHERNET))) {
          throw new Error(`packet ${received} came back changed`);
        }
        received++;
      }
      packets.free(burst, n);
      return received === count;
    },
    TIMEOUT_MS,
    `the loop (${sas === undefined ? 'in the clear' : places(sas).join(' and ')})`,
  );
  return `${received} packets`;
}

function packet(index: number): Buffer {
  const end = (n: number) => ({ mac: Uint8Array.of(2, 0, 0, 0, 0, n), address: [10, n, 0, 1], port: 4000 + n });
  const payload = Buffer.alloc((index * 37) % LONGEST_PAYLOAD, index & 0xff);
  return udpFrame({ from: end(1), to: end(2), payload });
}
