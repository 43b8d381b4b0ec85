/**
 * The other end of a NIC's link: it sends and expects the frames of `frames.ts`, sends back what comes, and keeps count of what it saw.
 * The same in a scenario's host half and in a test that has no guest.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { FramePort } from '../host/frames.ts';
import { checkTestFrame, isTestFrame, testFrame } from './frames.ts';
import { isIpsec, isIpv4, turnRound } from './packets.ts';

const WAIT_MS = 20_000;

export type WireRequest =
  /** `count` frames of the wire from number `first` (0) on, after `delayMs`. Answered when they are sent. */
  | {
      readonly kind: 'send';
      readonly count: number;
      readonly mtu: number;
      readonly first?: number;
      readonly delayMs?: number;
    }
  /** Takes nothing for a while: what the NIC sends meanwhile has to wait. */
  | { readonly kind: 'hold'; readonly ms: number }
  /** Frames 0 to `count - 1` of the NIC must have come, in order and byte for byte. */
  | { readonly kind: 'expect'; readonly count: number; readonly mtu: number }
  /** From now on: what comes goes back as it is (`loop`), back to its sender as an answer (`reflect`), or nowhere (`off`). */
  | { readonly kind: 'echo'; readonly how: 'loop' | 'reflect' | 'off' }
  /** What has come since it was asked last. */
  | { readonly kind: 'seen' }
  | { readonly kind: 'link'; readonly up: boolean };

export interface WireAnswer {
  readonly detail?: string;
  /** IPv4 packets that are ESP or AH, and others. */
  readonly ipsec?: number;
  readonly clear?: number;
}

export class WireEnd {
  readonly #port: FramePort;
  readonly #setLink: (up: boolean) => unknown;
  #ipsec = 0;
  #clear = 0;

  constructor(port: FramePort, setLink: (up: boolean) => unknown) {
    this.#port = port;
    this.#setLink = setLink;
  }

  async serve(request: WireRequest): Promise<WireAnswer> {
    switch (request.kind) {
      case 'send':
        if (request.delayMs !== undefined) await sleep(request.delayMs);
        offerFrames(this.#port, request.count, request.mtu, request.first);
        return {};
      case 'hold':
        this.#port.hold(request.ms);
        return {};
      case 'expect':
        return { detail: await expectFrames(this.#port, request.count, request.mtu) };
      case 'echo':
        this.#echo(request.how);
        return {};
      case 'seen': {
        const seen = { ipsec: this.#ipsec, clear: this.#clear };
        this.#ipsec = 0;
        this.#clear = 0;
        return seen;
      }
      case 'link':
        await this.#setLink(request.up);
        return {};
    }
  }

  #echo(how: 'loop' | 'reflect' | 'off'): void {
    this.#port.discard();
    if (how === 'off') this.#port.onFrame = undefined;
    else {
      this.#port.onFrame = (frame) => {
        if (isIpsec(frame)) this.#ipsec++;
        else if (isIpv4(frame)) this.#clear++;
        if (how === 'reflect') turnRound(frame);
        this.#port.send(frame);
      };
    }
  }
}

/** Expects frames 0 to `count - 1` of the NIC, in order and byte for byte. */
export async function expectFrames(port: FramePort, count: number, mtu: number, timeoutMs = WAIT_MS): Promise<string> {
  let bytes = 0;
  for (let i = 0; i < count; i++) {
    const frame = await port.next(isTestFrame, timeoutMs);
    checkTestFrame(frame, 'nic', i, mtu);
    bytes += frame.length;
  }
  return `${count} frames, ${bytes} bytes`;
}

/** Sends `count` frames of the wire from number `first` on. */
export function offerFrames(port: FramePort, count: number, mtu: number, first = 0): void {
  for (let i = first; i < first + count; i++) port.send(testFrame('wire', i, mtu));
}
