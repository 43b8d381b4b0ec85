/** The software device in the process of the test. */
import { type Device, type DeviceOptions, startDevice as start } from '../../../src/device/index.ts';

/** Bytes: enough for one queue pair and a driver of tests. Each mapping of 2 GiB would have V8 collect its garbage. */
const MEMORY = 2 ** 25;

export function startDevice(options: DeviceOptions): Device {
  return start({ memory: MEMORY, ...options });
}
