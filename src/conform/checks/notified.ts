/** Whether the device notifies of a buffer that it has used: what checks of both ring formats do. */
import type { Bench, UpOptions } from '../bench.ts';
import { need } from '../check.ts';
import type { Driver } from '../driver.ts';
import { udpFrame } from '../frames.ts';

export const TRANSMIT = 1;
/** Vector of the transmit queue. */
const VECTOR = 2;

/** A frame to the device's own address. */
export function ownFrame(bench: Bench): Uint8Array {
  const mac = bench.mac(bench.target);
  return udpFrame({ destination: mac, source: mac });
}

/** A running function, and how often its transmit queue's vector has fired. */
export interface Notified {
  readonly driver: Driver;
  fired(): number;
}

/** A function with vectors. */
export async function notifiedDriver(bench: Bench, options: UpOptions): Promise<Notified> {
  const driver = await bench.up({ ...options, stopped: true });
  need(bench.target.fn.interruptVectors > VECTOR, 'the device has fewer than three MSI-X vectors');
  const eventfds = bench.target.enableVectors(VECTOR + 1);
  driver.configureVector(TRANSMIT, VECTOR);
  driver.start();
  let count = 0;
  const fired = () => {
    count += eventfds[VECTOR].drain();
    return count;
  };
  return { driver, fired };
}

/** Has the device use one buffer and expects a notification. */
export async function expectNotified(bench: Bench, { driver, fired }: Notified, when: string): Promise<void> {
  const before = fired();
  await driver.transmit(ownFrame(bench));
  await bench.eventually(() => fired() > before, `no notification ${when}`);
  bench.log(`notified ${when}`);
}

/** Has the device use one buffer and expects no notification. */
export async function expectQuiet(bench: Bench, { driver, fired }: Notified, when: string): Promise<void> {
  const before = fired();
  await driver.transmit(ownFrame(bench));
  await bench.never(() => fired() > before, `a notification ${when}`);
  bench.log(`not notified ${when}`);
}
