/**
 * What an application does with a NIC: opens it, moves frames both ways, waits for them in each of the ways there are, follows the link,
 * resets the function, opens it again. Every byte is checked at both ends.
 */
import { readdirSync } from 'node:fs';
import { Feature, type Nic, type NicOptions, openFunction, openNic, type WaitPolicy } from '../../src/index.ts';
import { same } from '../guest/guest.ts';
import { poll, receiveFrames, sendFrames, waitForFrame } from './frames.ts';
import type { Place } from './place.ts';

/** More than a ring holds. */
const FRAMES = 400;
/** Each way after a reset. */
const FRAMES_AGAIN = 64;
/** Frames that come one by one, each this many milliseconds after it was asked for, when the receiver sleeps. */
const SPARSE = 8;
const DELAY_MS = 5;
/**
 * Interrupts that there must be, and frames until then at most: on a machine with too little time a frame may come before its receiver
 * sleeps.
 */
const FEW = 5;
const SPARSE_AT_MOST = 25;
/** Milliseconds for which the wire takes nothing, while more is sent than it holds. */
const HOLD_MS = 300;
/** Frames that are sent when those have arrived. */
const AFTERWARDS = 8;
const REOPEN = 2;
const LINK_MS = 10_000;

export const NicCheck = {
  open: 'openNic negotiates with the device, and sees its MAC, MTU and link',
  receive: 'frames of all lengths arrive in order and byte for byte, without interrupts',
  transmit: 'frames of all lengths leave in order and byte for byte',
  statistics: 'the statistics count what was moved',
  poll: 'frames one by one reach a receiver that waits by polling',
  interrupt: 'frames one by one wake a receiver that waits for interrupts',
  adaptive: 'frames one by one reach a receiver that looks first and then sleeps',
  link: 'the link is seen to go down and up, and told of',
  flr: 'after a function-level reset the NIC opens again and moves frames',
  reopen: 'opening and closing again and again leaks no descriptor and no mapping',
} as const;

export interface NicExpectation {
  readonly mac: string;
  readonly mtu: number;
  /** Negotiated besides VERSION_1, MAC and STATUS. */
  readonly features?: readonly number[];
  /** How it is opened. */
  readonly options?: NicOptions;
}

export async function nicBody(place: Place, expected: NicExpectation): Promise<void> {
  const { address } = place;
  const { options = {} } = expected;
  const nic = await openNic(address, options);
  await place.check(NicCheck.open, () => describeNic(nic, expected));
  await exchange(place, nic);
  await place.check(NicCheck.statistics, () => {
    const { rx, tx } = nic.statistics();
    if (rx.packets < FRAMES || tx.packets !== FRAMES + AFTERWARDS) throw new Error(JSON.stringify({ rx, tx }));
    same('invalid', [rx.invalid, tx.invalid, rx.dropped, tx.dropped], [0, 0, {}, {}]);
    return `${tx.ringFull} times no room, ${tx.renotified} notifications to a device that had stopped`;
  });
  for (const policy of ['poll', 'interrupt', 'adaptive'] as const) await waiting(place, nic, policy);
  await place.check(NicCheck.link, () => followLink(place, nic));
  await nic.close();
  await place.check(NicCheck.flr, async () => {
    const fn = openFunction(address);
    fn.reset();
    fn.close();
    const again = await openNic(address, options);
    await receiveFromWire(place, again, FRAMES_AGAIN);
    await sendToWire(place, again, FRAMES_AGAIN);
    await again.close();
  });
  await place.check(NicCheck.reopen, async () => {
    const before = readdirSync('/proc/self/fd').length;
    for (let i = 0; i < REOPEN; i++) await (await openNic(address, options)).close();
    same('descriptors', readdirSync('/proc/self/fd').length, before);
  });
}

function describeNic(nic: Nic, { mac, mtu, features = [] }: NicExpectation): string {
  same('MAC', Buffer.from(nic.mac).toString('hex'), mac.replaceAll(':', ''));
  same('MTU', nic.mtu, mtu);
  same('link', nic.link.up, true);
  if (!nic.features.hasAll(...features, Feature.VERSION_1, Feature.MAC, Feature.STATUS)) {
    throw new Error(`negotiated ${nic.features.names().join(' ')}`);
  }
  return nic.features.names().join(' ');
}

async function exchange(place: Place, nic: Nic): Promise<void> {
  await place.check(NicCheck.receive, async () => {
    const before = place.interrupts?.(0) ?? 0;
    const received = await receiveFromWire(place, nic, FRAMES);
    // Nobody waits, so nobody is to be interrupted: but once, because EVENT_IDX names an index, which is passed (2.7.10).
    const interrupts = (place.interrupts?.(0) ?? 0) - before;
    if (interrupts > 1) throw new Error(`${interrupts} interrupts, though nobody waits`);
    return received;
  });
  await place.check(NicCheck.transmit, () => sendToWire(place, nic, FRAMES));
}

async function receiveFromWire(place: Place, nic: Nic, count: number): Promise<string> {
  await place.wire({ kind: 'send', count, mtu: nic.mtu });
  await receiveFrames(nic, count);
  return `${count} frames`;
}

async function sendToWire(place: Place, nic: Nic, count: number): Promise<string | undefined> {
  await place.wire({ kind: 'hold', ms: HOLD_MS });
  await sendFrames(nic, count);
  const { detail } = await place.wire({ kind: 'expect', count, mtu: nic.mtu });
  // A device that had to wait may have forgotten that it is asleep now.
  await sendFrames(nic, AFTERWARDS);
  await place.wire({ kind: 'expect', count: AFTERWARDS, mtu: nic.mtu });
  return detail;
}

async function waiting(place: Place, nic: Nic, policy: WaitPolicy): Promise<void> {
  await place.check(NicCheck[policy], async () => {
    nic.queues[0].rx.policy = policy;
    const before = place.interrupts?.(0) ?? 0;
    const interrupts = () => (place.interrupts?.(0) ?? 0) - before;
    // Who looks again without being woken receives too, ten times a second: interrupts are what is to be seen here.
    const wanted = policy === 'interrupt' && place.interrupts !== undefined ? FEW : 0;
    let frames = 0;
    while (frames < SPARSE || (frames < SPARSE_AT_MOST && interrupts() < wanted)) {
      const sent = place.wire({ kind: 'send', count: 1, mtu: nic.mtu, first: frames, delayMs: DELAY_MS });
      await waitForFrame(nic, frames++);
      await sent;
    }
    if (place.interrupts === undefined) return undefined;
    if (interrupts() < wanted) throw new Error(`${interrupts()} interrupts for ${frames} frames`);
    return `${interrupts()} interrupts for ${frames} frames`;
  });
}

async function followLink(place: Place, nic: Nic): Promise<string> {
  const told: boolean[] = [];
  const stop = nic.onLink(({ up }) => told.push(up));
  for (const up of [false, true]) {
    await place.wire({ kind: 'link', up });
    await poll(() => nic.link.up === up && told.at(-1) === up, LINK_MS, `the link goes ${up ? 'up' : 'down'}`);
  }
  stop();
  same('told', told, [false, true]);
  return told.map((up) => (up ? 'up' : 'down')).join(', ');
}
