/**
 * A process that runs software devices on request, many of them one after the other or side by side. A request is
 * `{ id, device, action, options }`, its answer `{ id, value, error }`. It ends with the process that started it.
 */
import { startDevice } from '../../dist/src/device/index.js';

const devices = new Map();

const actions = {
  start: (number, options) => {
    devices.set(number, startDevice(options));
  },
  /** Returns how often the device had to survive a bug of its own. */
  stop: (number) => {
    const device = devices.get(number);
    devices.delete(number);
    device.close();
    return device.internalErrors;
  },
  statistics: (number) => devices.get(number).functions.map((one) => one.statistics()),
  announce: (number) => {
    for (const one of devices.get(number).functions) one.announce();
  },
};

process.on('message', ({ id, device, action, options }) => {
  try {
    process.send({ id, value: actions[action](device, options), error: null });
  } catch (cause) {
    process.send({ id, error: String(cause) });
  }
});
process.on('disconnect', () => process.exit());
