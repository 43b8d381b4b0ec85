/** The wire's half of `frames.ts`: whoever has the other end of the NIC's link. */
import type { FramePort } from '../host/frames.ts';
import { checkTestFrame, isTestFrame, testFrame } from './frames.ts';

/** Expects frames 0 to `count - 1` of the NIC, in order and byte for byte. */
export async function expectFrames(port: FramePort, count: number, mtu: number, timeoutMs = 20_000): Promise<string> {
  let bytes = 0;
  for (let i = 0; i < count; i++) {
    const frame = await port.next(isTestFrame, timeoutMs);
    checkTestFrame(frame, 'nic', i, mtu);
    bytes += frame.length;
  }
  return `${count} frames, ${bytes} bytes`;
}

/** Sends frames 0 to `count - 1` of the wire. */
export function offerFrames(port: FramePort, count: number, mtu: number): void {
  for (let i = 0; i < count; i++) port.send(testFrame('wire', i, mtu));
}
